-- Version 1 had the key (model, request_id, variant). The oldest of several answers to a request is kept.
INSERT INTO predictions
    (model, principal, request_id, shadow, variant, version, role, unit, at, seconds, rows, answer)
SELECT
    model, principal, request_id, CASE role WHEN 'shadow' THEN variant ELSE '' END, variant, version, role,
    unit, at, seconds, rows, answer
FROM predictions_1
WHERE true
ORDER BY at
ON CONFLICT DO NOTHING
