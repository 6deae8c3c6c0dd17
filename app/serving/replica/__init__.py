"""The code of a replica: the endpoint, its loaded variants, records, shadows and metrics."""
