"""Every key that exists, with its default. A config file starts from `defaults()` and changes what it needs.

Sizes here are those of a tiny model on a laptop; configs of published recipes overwrite them.
"""

from ml_collections import ConfigDict


def recipe(**changes) -> ConfigDict:
    """How one model is trained: base, reference and target each have one of these."""
    keys = ConfigDict(
        dict(
            seed=0,
            mode="full",  # 'full': every parameter; 'lora': LoRA on the decoder and the whole projector
            batch=32,  # records a step
            micro_batch=32,  # records a forward pass; a step's records are sorted by length, then cut into these
            epochs=1.0,  # passes over what the row holds (the pool or the coreset)
            steps=0,  # optimiser steps; 0 = from epochs
            learning_rate=1e-3,
            projector_learning_rate=1e-3,
            warmup=0.03,  # share of the steps
            weight_decay=0.0,
            clip=1.0,  # global gradient norm
            loss_mean="tokens",  # of a step: over its supervised tokens, or over the means of its 'records'
            lora=dict(rank=8, alpha=16.0, dropout=0.0, targets=("wq", "wk", "wv", "wo", "gate", "up", "down")),
            remat=False,
            checkpoint_every=200,  # steps
            keep=2,  # checkpoints
        )
    )
    keys.update(changes)
    return keys


def defaults() -> ConfigDict:
    """All keys."""
    return ConfigDict(
        dict(
            name="run",
            dataset=dict(
                records="",  # LLaVA JSON or JSONL (.gz too); 'drawn' draws the embedded data set
                images="",  # folder that the records' image paths start from
                base_records="",  # records of the base, when they are not a share of `records`
                share_heldout=0.1,  # of the images; not taken when evaluate.questions names a folder
                share_dev=0.02,
                base_share=0.2,  # of the images, for the base; not taken when target.path or base_records is given
                limit=0,  # use only the first so many records; 0 = all
                max_bad=0.05,  # more quarantined records than this share is an error
                unique_ids=True,  # the second record of an id is quarantined
                seed=0,
                template="vicuna_v1",
                system="A chat between a curious user and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the user's questions.",
                vocab=2048,  # entries of a tokenizer trained here
                max_length=160,  # positions of a sequence, image included; longer ones are cut
                buckets=(64, 96, 128, 160),  # padded lengths, image included; the last is max_length
                image_size=48,
                threads=2,  # reading threads
                cache_mib=512,  # decoded images kept in memory
                drawn=dict(records=3000, heldout=600, base=8000, seed=0),
            ),
            model=dict(  # of the base trained here; a checkpoint folder brings its own
                vision=dict(patch=12, width=96, depth=3, heads=4, mlp=288),
                decoder=dict(width=96, depth=6, heads=4, kv_heads=2, mlp=256),
            ),
            target=dict(path=""),  # checkpoint folder of the weights every row starts from; '' = train a base
            base=recipe(),
            reference=dict(path="", train=recipe()),  # '' = the base tuned on the pool
            extract=dict(
                num_layers=5,
                taps=(),  # 0-based decoder layers; () = num_layers spread over the depth
                rows_per_device=32,
                scores=False,  # nll, EL2N, AUM of each record too (the forward pass then runs to the logits)
                features="",  # features made elsewhere (.zarr or .npy); nothing is extracted
            ),
            cluster=dict(
                k=60,
                seed=1234,
                iterations=50,
                chunk=4096,  # rows of one matrix product
                mode="exact",
                centroids="",  # made elsewhere, with `assignment`; nothing is clustered
                assignment="",
            ),
            select=dict(
                name="coincide",
                fraction=0.2,
                seed=0,
                variant="official",  # a preset of the keys below, each settable alone; '' of a key = the preset's
                tau=0.1,
                sigma=1.0,
                transfer_part="",  # text | all
                mask_above=0.0,  # cosines above this are left out of S_i; 0 = the preset's, 2 = no mask
                diagonal="",  # yes | no
                allocation="",  # sequential | exact
                min_per_cluster=0,
                intra="mmd",  # mmd | nearest | random
            ),
            curriculum=dict(
                name="uniform",
                pool="coreset",  # coreset | all
                k=0,  # arms; 0 = the clusters
                lag=0,  # rounds between drawing a plan and the last update it knows of
                round_steps=10,  # S
                gamma=0.1,  # exploration
                mu=0.3,  # moving-average rate of the rewards
            ),
            train=recipe(),
            evaluate=dict(
                questions="",  # folder of <task>.jsonl; '' = the held-out share of the records
                part="heldout",  # heldout | dev: settings are chosen on dev, results are told of heldout
                rows=32,  # questions a batch
                max_new_tokens=24,
                limit=0,  # questions a task, drawn by fixed seed; 0 = all
                tasks_to_rank=5,  # with fewer tasks learned by the full-data row nothing is ranked
                bootstrap=1000,  # resamples of the 95 % intervals
                seed=0,
            ),
            seeds=(0,),  # of every row of the table
            device=dict(model_parallel=1, precision="auto"),  # auto | float32 | bfloat16
        )
    )


def four_rows(add) -> None:
    """The table of a run: COINCIDE (the headline), all data, a random coreset of the same size, COINCIDE+."""
    add("coincide", {"select.name": "coincide", "curriculum.pool": "coreset", "curriculum.name": "uniform"})
    add("full", {"curriculum.pool": "all", "curriculum.name": "uniform"})
    add("random", {"select.name": "random", "curriculum.pool": "coreset", "curriculum.name": "uniform"})
    add("coincide_plus", {"curriculum.pool": "all", "curriculum.name": "coincide_plus"})
