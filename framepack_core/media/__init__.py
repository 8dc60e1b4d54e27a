"""Pictures and videos: reading, cropping, colours, encoding, previews."""
