"""What a request passes before an endpoint: HAProxy, header checks, tokens, rate limits, gRPC."""
