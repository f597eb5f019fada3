"""The review page: right and wrong answers of evaluations in one HTML file."""
