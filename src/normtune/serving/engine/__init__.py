"""The inference engine: batches requests of many adapters. It needs no HTTP."""
