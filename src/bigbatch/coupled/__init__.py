"""Losses over the whole batch that couple samples: encode twice, differentiate the loss on all features once."""
