-- The batch is a JSON array of predictions, each an array in the order of the columns.
INSERT INTO predictions
    (model, principal, request_id, shadow, variant, version, role, unit, at, seconds, rows, answer)
SELECT
    value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6, value ->> 7,
    CAST(value ->> 8 AS float8), CAST(value ->> 9 AS float8),
    convert_to(value ->> 10, 'UTF8'), convert_to(value ->> 11, 'UTF8')
FROM json_array_elements(CAST(:batch AS json)) AS batch (value)
WHERE true
ON CONFLICT DO NOTHING
