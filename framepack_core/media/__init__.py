"""Pictures and videos: reads, crops, converts colours, encodes, draws previews."""
