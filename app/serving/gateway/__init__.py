"""The gateway between clients and endpoints: HAProxy, header checks, tokens, rate limits and gRPC."""
