"""Between S3 and state_dicts."""
