"""What tests of objectives, samplers and backbones need, for plugins here and elsewhere."""
