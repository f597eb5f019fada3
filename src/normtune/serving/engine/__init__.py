"""The inference engine: answers requests for many adapters in shared batches. It does not need HTTP."""
