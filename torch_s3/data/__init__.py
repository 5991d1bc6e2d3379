"""From keys to samples."""
