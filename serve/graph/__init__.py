"""The Serve graph: deployments, batches, and what crosses between them."""
