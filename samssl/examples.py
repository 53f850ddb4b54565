"""What stands at the end of each command's `--help`: commands to copy, each with what it is for.

The tests read them as they read those of the documents.
"""

EXAMPLES = {
    "simulate": """
# 28 subjects made of the MNI152 template, at 3 mm: what the demo is made of
samssl simulate out=runs/subjects subjects=28 spacing_mm=3.0
""",
    "prepare": """
# a public data set, split as its study has it
samssl prepare --config ray_configs/runs/hippocampus_prepare.yaml data.root=/data/Task04_Hippocampus
# a folder with images/ and masks/ of your own; the patient is the number that file names begin with
samssl prepare name=lesions out=runs/lesions/store data.root=/data/lesions data.modality=US \\
    'data.labels={1: lesion}' 'data.patient_pattern=^(\\d+)_'
""",
    "inspect": """
# before anything is prepared: scans of a public data set
samssl inspect /data/Dataset_BUSI_with_GT data.recipe=busi name=busi out=runs/busi/inspect
# a slice store, with its splits
samssl inspect runs/hippocampus_stages/store out=runs/hippocampus_stages/inspect
""",
    "pretrain": """
# on the store that the example of `samssl prepare` writes
samssl pretrain --config ray_configs/runs/hippocampus_pretrain.yaml
# SAM ViT-B from Meta's weights, on four GPUs; `samssl plan` with the same arguments says what it needs
samssl pretrain --config ray_configs/runs/vit_b_pretrain.yaml data.store=/data/my-store \\
    out=runs/vit_b/pretrain model.checkpoint=sam resources.workers=4
# the same command again goes on after an interruption; this goes on for longer, in a folder of its own
samssl pretrain --config ray_configs/runs/hippocampus_pretrain.yaml optim.steps=5000 \\
    continue_from=runs/hippocampus_stages/pretrain out=runs/hippocampus_stages/pretrain_longer
""",
    "finetune": """
# five labelled patients, from the encoder that the example of `samssl pretrain` writes
samssl finetune --config ray_configs/runs/hippocampus_finetune.yaml data.shots=5
# the same from the weights that pretraining began with, to compare
samssl finetune --config ray_configs/runs/hippocampus_finetune.yaml data.shots=5 \\
    model.checkpoint=null out=runs/hippocampus_stages/finetune_no_ssl
# another strategy (`samssl strategies` lists them), from an encoder of your own
samssl finetune --config ray_configs/runs/vit_b_finetune.yaml data.store=/data/my-store \\
    strategy.method=adapter model.checkpoint=runs/vit_b/pretrain/encoder.pth
""",
    "export": """
# an SSL encoder with its model card
samssl export run=runs/hippocampus_stages/pretrain out=runs/hippocampus_export card.license=cc-by-nc-4.0
# a model of one label, as weights that segment_anything loads
samssl export run=runs/merge merge=true out=runs/merge_export
# any fine-tuned SAM as ONNX; needs pip install 'samssl[onnx]'
samssl export run=runs/hippocampus_stages/finetune onnx=true out=runs/hippocampus_onnx
""",
    "evaluate": """
samssl evaluate --config ray_configs/runs/hippocampus_evaluate.yaml
# any bundle on any store with the same label map, in bf16
samssl evaluate bundle=runs/mine/finetune/bundle store=runs/mine/store out=runs/mine/evaluate precision=bf16
""",
    "predict": """
# the mask of a scan, on the scan's own voxels: runs/masks/scan_mask.nii.gz
samssl predict runs/mine/finetune/bundle scan.nii.gz --out runs/masks
# every scan of a folder, DICOM series too, by three bundles together, without specks
samssl predict runs/mine/finetune/bundle /data/new --out runs/masks min_component_ml=0.1 \\
    'more_bundles=[runs/seed1/finetune/bundle, runs/seed2/finetune/bundle]'
# what points and boxes of a file point at, by a bundle of mode=promptable
samssl predict runs/promptable/bundle scan.nii.gz --out runs/masks prompts=prompts.csv
""",
    "serve": """
# then open http://127.0.0.1:8000 and drop a scan, or:
#   curl --data-binary @scan.nii.gz --output mask.nii.gz http://127.0.0.1:8000/predict
samssl serve runs/mine/finetune/bundle
# three bundles together, small uploads only
samssl serve runs/mine/finetune/bundle port=8080 max_megabytes=50 \\
    'more_bundles=[runs/seed1/finetune/bundle, runs/seed2/finetune/bundle]'
""",
    "nnunet": """
# needs pip install 'samssl[nnunet]'; the same five patients as shots=5 and seed 0 of a study
samssl nnunet out=runs/nnunet store=/data/my-store shots=5 shot_seed=0
""",
    "export-runs": """
samssl export-runs experiment=hippocampus out=/data/hippocampus_runs
""",
    "import-runs": """
samssl import-runs folder=/data/hippocampus_runs
""",
    "report": """
samssl report study=runs/hippocampus
""",
    "sweep": """
samssl sweep --config ray_configs/sweeps/lora_rank.yaml prepare.data.root=/data/Task04_Hippocampus
""",
    "study": """
# how many runs that is and what they cost, without doing any
samssl study --config ray_configs/studies/hippocampus.yaml \\
    prepare.data.root=/data/Task04_Hippocampus 'seeds=[0, 1, 2]' dry_run=true
# with and without SSL, on the same patients
samssl study --config ray_configs/studies/hippocampus.yaml prepare.data.root=/data/Task04_Hippocampus
""",
    "demo": """
samssl demo
# a shorter look, in another folder
samssl demo out=runs/demo_short pretrain.optim.steps=300
""",
    "doctor": """
samssl doctor
# also starts Ray, or joins the cluster of RAY_ADDRESS, and runs one task
samssl doctor --ray
""",
    "completion": """
# for good: put one of these into ~/.bashrc or ~/.zshrc
eval "$(samssl completion bash)"
eval "$(samssl completion zsh)"
""",
    "plan": """
# on this machine, and on a GPU with 24 GiB and 165 TFLOP/s in bf16
samssl plan --config ray_configs/runs/vit_b_pretrain.yaml
samssl plan --config ray_configs/runs/vit_b_pretrain.yaml --gib 24 --tflops 165
""",
    "datasets": """
samssl datasets
# one whole: layout, labels, licence, what to cite, how to get it
samssl datasets acdc
""",
    "download": """
samssl download msd_spleen /data
samssl prepare data.recipe=msd_spleen data.root=/data/Task09_Spleen name=spleen out=runs/spleen/store
""",
    "strategies": """
samssl strategies
samssl strategies --all --profile paper
""",
    "lineage": """
samssl lineage runs/hippocampus_stages/finetune/bundle
samssl lineage models:/samssl-micro-encoder@newest
""",
    "promote": """
samssl promote runs/hippocampus_stages/finetune/bundle --alias champion
""",
    "submit": """
export RAY_AUTH_TOKEN=...                              # the cluster's
export MLFLOW_TRACKING_URI=http://TRACKING:5000        # a server that every node reaches
samssl submit study --address http://HEAD:8265 --config ray_configs/studies/hippocampus.yaml \\
    prepare.data.root=/shared/Task04_Hippocampus out=/shared/runs/hippocampus
""",
}


def example(command: str) -> str:
    """The end of the help of `samssl command`; empty where it has no example."""
    text = EXAMPLES.get(command, "").strip()
    return "examples:\n" + "\n".join(f"  {line}" for line in text.splitlines()) if text else ""
