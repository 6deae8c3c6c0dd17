-- The batch is a JSON array of predictions, each an array in the order of the columns.
INSERT INTO predictions
    (model, principal, request_id, shadow, variant, version, role, unit, at, seconds, rows, answer)
SELECT
    value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6, value ->> 7,
    value ->> 8, value ->> 9, CAST(value ->> 10 AS BLOB), CAST(value ->> 11 AS BLOB)
FROM json_each(:batch)
WHERE true
ON CONFLICT DO NOTHING
