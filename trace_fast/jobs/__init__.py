"""Jobs over many images: their inputs, threads, shards and manifest, and the callable for engines."""
