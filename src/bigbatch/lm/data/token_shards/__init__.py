"""Shards of tokens that other tools wrote: MosaicML Streaming's and webdataset's, local or remote."""
