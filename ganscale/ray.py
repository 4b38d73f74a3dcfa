"""Train in the workers of a `ray.train.torch.TorchTrainer` of your own.

    import ganscale.ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        ganscale.ray.train_loop_per_worker,
        train_loop_config={"config": "dcgan-cifar10", "name": "mine"},
        scaling_config=ScalingConfig(num_workers=2),
    ).fit()

`ganscale train` needs none of this: it makes the trainer itself, and changes the number of workers
as nodes come and go.
"""

from ganscale.launch.ray_worker import train_loop_per_worker

__all__ = ["train_loop_per_worker"]
