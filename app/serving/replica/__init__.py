"""What runs in a replica: the endpoint, its loaded variants, records, shadows and metrics."""
