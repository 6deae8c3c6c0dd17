-- Version 1 had the key (model, request_id), and `principal` was the sender. Any client could send feedback on
-- any prediction, so the new `principal` is the sender if they have a prediction with this request id, else
-- the principal of the oldest one, else the sender.
INSERT INTO feedback (model, principal, request_id, said, reward, said_by, at, state)
SELECT
    f.model,
    coalesce(
        (
            SELECT f.principal FROM predictions p
            WHERE p.model = f.model AND p.request_id = f.request_id AND p.shadow = ''
                AND p.principal = f.principal
        ),
        (
            SELECT p.principal FROM predictions p
            WHERE p.model = f.model AND p.request_id = f.request_id AND p.shadow = ''
            ORDER BY p.at LIMIT 1
        ),
        f.principal
    ),
    f.request_id, f.said, f.reward, f.principal, f.at,
    CASE WHEN f.quarantined THEN 'excess' ELSE 'counts' END
FROM feedback_1 f
