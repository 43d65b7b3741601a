"""What is seen of a running gateway: metrics, logs, traces, impressions."""
