"""Commands or options that remedy an error."""

from feature_store.errors import Remedy

COMMANDS = {
    Remedy.WRITE_STORE: "write one with `teacher-service cache --store STORE`",
    Remedy.FINISH_STORE: "finish the store with the same `teacher-service cache` command",
    Remedy.REWRITE_UNIT: "run `feature-store repair --yes --drop-damaged STORE`, then the same `teacher-service cache` "
    "command, which writes only that unit again",
    Remedy.RETRY_QUARANTINED: "fix the tar and run the same `teacher-service cache` command with --retry-quarantined",
    Remedy.EXACT_CODEC: "use --tap-codec f32 (--logits-codec f32 for logits)",
    Remedy.REPAIR: "run `feature-store repair STORE`, which lists repairs",
    Remedy.LOCAL_CHECKPOINT: "pass it with --checkpoint",
    Remedy.MODEL_OPTIONS: "see --model-kwargs",
    Remedy.TOKEN: "student-trainer also takes --token-file",
    Remedy.SOURCE: "student-trainer takes a service's own URL as --source",
    Remedy.ADD_TARS: "add it to --tars",
    Remedy.ALLOW_PIPE: "give --allow-pipe",
    Remedy.LIST_TEACHERS: "`teacher-service teachers` lists them",
    Remedy.NAME_TEACHER: "give it as --teacher (student-trainer: --teacher.name), if you trust it",
    Remedy.LABELS: "fields are named with --label-field, classes with --classes; samples without labels need --labels "
    "optional or --labels none",
}
