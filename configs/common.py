"""Every key that exists, with its default. A config file starts from `defaults()` and changes what it needs.

Sizes here are those of a tiny model on a laptop; configs of published recipes overwrite them.
"""

from ml_collections import ConfigDict

from coincide_jax.core.errors import UserError, unknown


def recipe(**changes) -> ConfigDict:
    """How one model is trained: base, reference and target each have one of these."""
    keys = ConfigDict(
        dict(
            seed=0,
            mode="full",  # full: every parameter; lora: LoRA on the decoder, and the projector; projector: it alone
            batch=32,  # records a step
            micro_batch=32,  # records a forward pass; a step's records are sorted by length, then cut into these
            epochs=1.0,  # passes over what the row holds (the pool or the coreset)
            steps=0,  # optimiser steps; 0 = from epochs
            learning_rate=1e-3,
            projector_learning_rate=1e-3,
            warmup=0.03,  # share of the steps
            weight_decay=0.0,
            clip=1.0,  # global gradient norm
            # of a step: over its supervised tokens, or over the means of its 'records', or over those of each
            loss_mean="tokens",  # 'micro_batch', cut in the order drawn (the published program)
            lora=dict(rank=8, alpha=16.0, dropout=0.0, targets=("wq", "wk", "wv", "wo", "gate", "up", "down")),
            packing=False,  # several records in a row of dataset.max_length; micro_batch still counts records
            remat=False,
            checkpoint_every=200,  # steps
            keep=2,  # checkpoints
            tensorboard=False,  # events/ beside metrics.jsonl, by tensorboardX (extra 'tensorboard')
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
                tokenizer_text="all",  # what it learns of the pool: all | questions (of the base always all)
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
            reference=dict(path="", train=recipe()),  # checkpoint folder, of CLIP too; '' = the base tuned on the pool
            extract=dict(
                num_layers=5,
                taps=(),  # 0-based decoder layers, -1 = the last; () = num_layers spread over the depth
                tap_from="attention",  # a layer's attention (output projection) | mlp | block (residual stream)
                squash="tanh",  # of the mean over tokens: tanh | sign (booleans); tanh_first: tanh, then the mean
                rows_per_device=32,
                reads="all",  # all | questions: nothing that depends on an answer
                image_encoder="",  # reads=questions: folders of DINOv2 and BERT; '' = the towers of the base
                text_encoder="",
                encoder_size=224,  # pixels that image_encoder is shown
                unit_halves=True,  # image and text half of one length; False: as the encoders give them
                scores=False,  # nll, EL2N, AUM of each record too (the forward pass then runs to the logits)
                features="",  # features made elsewhere (.zarr or .npy); nothing is extracted
            ),
            cluster=dict(
                k=60,
                seed=1234,
                iterations=50,
                chunk=4096,  # rows of one matrix product over all devices; smaller where memory wants it
                mode="exact",  # exact | sketch: early iterations on a few principal directions
                sketch_rank=256,  # directions of mode=sketch
                init="random",  # random | k-means++ (of features that fit the devices) | k-means||
                centre=False,  # take the mean feature out first
                max_points_per_centroid=0,  # centroids from a sample of so many records each; 0 = from all
                memory_mib=0,  # of features kept on all devices, streamed above; 0 = their free memory, 4096 on CPUs
                product="auto",  # auto | float32 | bfloat16 | float16: fast products; the labels are the same
                checkpoint_every=1,  # iterations
                centroids="",  # made elsewhere, with `assignment`; nothing is clustered
                assignment="",
                audit_labels=("task", "concept", "skill"),  # columns of the records, for the audit alone
                audit=dict(
                    separation=True,  # silhouette of each cluster: one more pass over the features
                    duplicates=0.99,  # pairs of a cluster above this cosine are counted; 1 = none
                    pairs=2000,  # records of a cluster that are compared for it
                    cache_mib=1024,  # rows read at once for it, memory_mib at most; less: more passes over them
                    stability=False,  # adjusted Rand index with the clusters of another seed: a second clustering
                ),
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
                weights="both",  # both | transfer | density | equal: what the shares of the clusters go by
                intra="mmd",  # mmd | nearest | random
                refine=0,  # sweeps that exchange picks for lower MMD² after the greedy ones; 0 = none
                gram="float64",  # float32: the inner products; what it costs in picks and MMD² is measured and told
                cache_mib=2048,  # memory of rows and kernel matrices; a matrix above an eighth is made in parts
            ),
            curriculum=dict(
                name="uniform",
                pool="coreset",  # coreset | all
                k=0,  # arms; 0 = the clusters
                lag=0,  # rounds between drawing a plan and the last update it knows of
                round_steps=10,  # S
                draw="",  # sample | step: an arm for each record or for a whole step; '' = the sampler's own
                order="random",  # static: random | given, as in select/indices.npy
                difficulty="",  # easy_to_hard, hard_to_easy: nll | el2n of extract/scores.parquet; '' = first losses
                reward="",  # absolute | relative drop of an arm's loss; '' = the sampler's own
                rescale=False,  # rewards by the 5 % to 95 % range of the last 1,024; 0.5 = no change
                gamma=0.1,  # exploration mass of all arms together
                mu=0.3,  # moving-average rate of rewards, and of losses in rehearsal
                eta=0.0,  # learning rate of Exp3's family, Tsallis-INF, Skill-it; 0 = the published one
                alpha=1e-3,  # exp3s: share of the weights that is dealt out anew each step; about 1/steps
                drift=0.2,  # exp3r: an arm better by this than the believed best makes it begin anew
                drift_draws=5.0,  # exp3r: exploration draws of each arm between two tests
                tau=0.5,  # progress: temperature
                delta=0.1,  # progress: exploration
                positive_only=False,  # progress: only arms that improve, as in the authors' program
                objective="loss",  # what a probe measures: loss | accuracy (long answers: half of the tokens)
                probe=0,  # records of each arm measured between rounds; 0 = the training losses serve
                watch=0,  # records of the dev part measured between rounds, for the report alone
                probe_from="heldout",  # heldout: taken out of the pool | seen (progress): trained on before
                budget=0.0,  # progress: share of the pool asked for; skill_it: for its steps; 0 = select.fraction
                answers="",  # progress: JSONL of {id, answers} in place of the records' own
                warmup=0.09,  # progress: share of the pool that COINCIDE chooses, trained on first; 0 = none
                warmup_k=300,  # progress: clusters that the warm-up is chosen from
                graph="linear",  # skill_it, which task helps which: linear | brute | identity
                graph_steps=50,  # skill_it: steps of each run that the graph is learned from
                rehearsal=0.0,  # share of slots that replay what is being forgotten, around any online sampler
                visits=0,  # least visits of every arm in a window; 0 = no promise
                window=100,  # steps
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
            plan=dict(  # for --plan alone, where data and weights are not at hand
                records=0,  # of dataset.records
                length=0,  # positions of a record on average; 0 = the shortest of dataset.buckets
                efficiency=0.4,  # share of the peak at which hours are told
                reference=dict(  # sizes of reference.path; a decoder of width 0 = those of the target
                    image_size=0,
                    vocab=0,
                    vision=dict(patch=0, width=0, depth=0, heads=0, mlp=0),
                    decoder=dict(width=0, depth=0, heads=0, kv_heads=0, mlp=0),
                ),
            ),
            device=dict(model_parallel=1, precision="auto"),  # auto | float32 | bfloat16 | float16
        )
    )


def choose(config: ConfigDict, file: str, argument: str, words: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Reads the argument of a config file, `WORD,…` and `curriculum=NAME` in any order, and sets that curriculum.

    Returns the words. Raises `UserError` for one that is not in `words`, or for two curricula.
    """
    found = [word for word in argument.split(",") if word]
    names = [word.removeprefix("curriculum=") for word in found if word.startswith("curriculum=")]
    others = tuple(word for word in found if not word.startswith("curriculum="))
    if wrong := [word for word in others if word not in words]:
        raise unknown(f"argument of {file}:{argument}", wrong[0], (*words, "curriculum=NAME"))
    if len(names) > 1:
        raise UserError(f"{file}:{argument} names the curricula {' and '.join(names)}; expected one")
    for name in names:
        config.curriculum.name = name
        config.curriculum.pool = "coreset" if name in ("uniform", "static") else "all"
        if name == "progress":  # nothing reads an answer before it is asked for
            config.dataset.tokenizer_text = config.extract.reads = "questions"
        if name == "skill_it":
            config.curriculum.probe = 2
    return others


def four_rows(add) -> None:
    """The table of a run: COINCIDE (the headline), all data, a random coreset of the same size, COINCIDE+."""
    add("coincide", {"select.name": "coincide", "curriculum.pool": "coreset", "curriculum.name": "uniform"})
    add("full", {"curriculum.pool": "all", "curriculum.name": "uniform"})
    add("random", {"select.name": "random", "curriculum.pool": "coreset", "curriculum.name": "uniform"})
    add("coincide_plus", {"curriculum.pool": "all", "curriculum.name": "coincide_plus"})
