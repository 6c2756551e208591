"""Six relatives of T2T-ViT, each under its authors' names: DeiT, TNT, PVT, PVT v2, Swin and PatchConvNet."""
