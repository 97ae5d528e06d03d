"""Who attends to whom, in integers: spans, bands, masks, layouts, tiles. Nothing here knows torch."""
