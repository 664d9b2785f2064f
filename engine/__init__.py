"""SSW-GAN: stage-wise training of video GANs, with DVD-GAN as its baseline."""
