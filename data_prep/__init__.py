"""From raw Wikipedia, books or any text to tokenized, checksummed shards. See `data_prep.build`."""
