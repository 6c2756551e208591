"""Six relatives of T2T-ViT: DeiT, TNT, PVT, PVT v2, Swin, PatchConvNet (chapters 18 to 24)."""
