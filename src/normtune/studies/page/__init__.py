"""The HTML report page of a study."""
