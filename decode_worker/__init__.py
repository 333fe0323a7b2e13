"""A worker of the decode pool: reserve, await KV, continuous batching, stream. Unified, it prefills by itself, too."""
