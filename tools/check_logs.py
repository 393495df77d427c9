#!/usr/bin/env python3
"""Reads run logs with the readers of the programs that they are for.

usage: check_logs.py [FOLDER]      a run's folder (log.jsonl, events.out.tfevents.*, wandb/); without one, a run is made

  TensorBoard   its EventAccumulator must give back every scalar, histogram, image and text, and the hyperparameters
  W&B           its datastore.py (packages up to 0.28) and protobuf messages must give back every record, and `wandb
                sync` must upload every row, media file, the config and the summary to a stand-in for its server
  JSON lines    Python's json, with NaN and Infinity refused, is what all are compared with

All of it once more after 20 bytes are cut from the tail of each file, and after the run was resumed (if it was made
here). Ran with tensorboard 2.21.0, wandb 0.31.0 (sync) and 0.28.2 (datastore.py), protobuf 7.36.2, numpy 2.4.6, Python
3.11. For a datastore.py beside a newer wandb, put the folder of an older one into WANDB_OLD: pip install --no-deps
--target FOLDER wandb==0.28.2. A developer's tool: neither the library nor its tests need Python.
"""
import collections
import glob
import gzip
import hashlib
import http.server
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading

import numpy as np
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import plugin_data_pb2

logging.disable(logging.WARNING)    # TensorBoard tells of what a resumed run voids

WRITER = r"""
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"
static const unsigned char png[] = {  /* 2 x 1, grey */
    0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x48, 0x44, 0x52, 0x00, 0x00,
    0x00, 0x02, 0x00, 0x00, 0x00, 0x01, 0x08, 0x00, 0x00, 0x00, 0x00, 0xd1, 0x49, 0x20, 0x56, 0x00, 0x00, 0x00,
    0x0b, 0x49, 0x44, 0x41, 0x54, 0x78, 0xda, 0x63, 0x60, 0xf8, 0x0f, 0x00, 0x01, 0x02, 0x01, 0x00, 0xd1, 0x1a,
    0xcb, 0x8f, 0x00, 0x00, 0x00, 0x00, 0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82 };
int main(int argc, char **argv)
{
    dot_context *ctx = dot_context_create(NULL);
    dot_logger_options o = dot_logger_defaults();
    int64_t first = argc > 2 ? atoll(argv[2]) : 0, last = argc > 3 ? atoll(argv[3]) : 2000;
    o.group = "checks";
    o.resume = first > 0;
    o.resume_step = first > 0 ? first : -1;
    dot_logger *log = dot_logger_create(ctx, argv[1], &o);
    dot_logger_config_number(log, "lr", 1e-3);
    dot_logger_config_text(log, "optimizer", "AdamW \"\\ \xce\xbb\n");
    dot_logger_config_bool(log, "resumed", first > 0);
    for (int64_t step = first; step < last; ++step) {
        const char *tags[3] = { "loss/train", "lr", "odd" };
        double odd = step % 5 == 1 ? NAN : step % 5 == 2 ? INFINITY : -INFINITY;
        double values[3] = { 1.0 / (double)(step + 1), 1e-3 * (double)step, odd };
        dot_logger_scalars(log, step, 3, tags, values);
        dot_logger_scalar(log, step, "one", dot_random_normal(7, 0, (uint64_t)step));
        if (step % 100 == 50) {
            double sample[5000];
            char text[60001];
            for (int i = 0; i < 5000; ++i) sample[i] = dot_random_normal(1, (uint64_t)step, (uint64_t)i);
            dot_logger_histogram(log, step, "weights", sample, 5000);
            dot_logger_image(log, step, "slice/mu_a", png, sizeof png);
            memset(text, 'x', sizeof text);
            text[step * 30 % 60001] = 0;
            dot_logger_text(log, step, "note", text);           /* crosses the blocks of the .wandb file */
        }
    }
    if (argc <= 4) dot_logger_close(log, true);
    if (!dot_ok(ctx)) printf("%s\n", dot_error(ctx));
    int failed = !dot_ok(ctx);
    dot_context_destroy(ctx);
    return failed;
}
"""

EVERYTHING = {name: 0 for name in ("distributions", "images", "audio", "scalars", "histograms", "tensors")}


def nonfinite(text):
    raise ValueError(f"{text} is not JSON")


def read_json(folder):
    """Whole lines; what a resume record supersedes is dropped."""
    records, lines = [], open(os.path.join(folder, "log.jsonl"), "rb").read().split(b"\n")
    for line in lines[:-1]:
        record = json.loads(line.decode("utf-8"), parse_constant=nonfinite)
        if record["kind"] == "resume" and "step" in record:
            records = [r for r in records if r["kind"] in ("start", "config") or r.get("step", -1) < record["step"]]
        records.append(record)
    return records, len(lines[-1])


def scalars_of(records):
    """tag -> [(step, value)]"""
    out = collections.defaultdict(list)
    for record in records:
        if record["kind"] == "scalars":
            for tag, value in record["values"].items():
                odd = record.get("nonfinite", {}).get(tag)
                assert (value is None) == (odd is not None), record
                out[tag].append((record["step"], float(odd) if odd else value))
    return out


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


def check_tensorboard(folder, records, short):
    """`short`: records that a cut may have taken from the end of each kind."""
    events = event_accumulator.EventAccumulator(folder, size_guidance=EVERYTHING)
    events.Reload()
    count = 0
    for tag, expected in scalars_of(records).items():
        found = events.Scalars(tag)
        assert len(expected) - short <= len(found) <= len(expected), (tag, len(found), len(expected))
        for event, (step, value) in zip(found, expected):
            assert event.step == step and same(np.float32(event.value), np.float32(value)), (tag, event, step, value)
        count += len(found)
    histograms = [r for r in records if r["kind"] == "histogram"]
    found = events.Histograms("weights") if histograms else []
    assert len(found) >= len(histograms) - short
    for event, record in zip(found, histograms):
        h, edges = event.histogram_value, np.linspace(record["low"], record["high"], len(record["counts"]) + 1)
        assert list(h.bucket) == record["counts"] and np.allclose(h.bucket_limit, edges[1:], rtol=1e-14)
        keys = ("min", "max", "count", "sum", "sum_squares")
        assert (h.min, h.max, h.num, h.sum, h.sum_squares) == tuple(record[k] for k in keys)
    images = [r for r in records if r["kind"] == "image"]
    found = events.Images("slice/mu_a") if images else []
    assert len(found) >= len(images) - short
    for event, record in zip(found, images):
        png = event.encoded_image_string
        assert (event.width, event.height, len(png)) == (record["width"], record["height"], record["bytes"])
        assert hashlib.sha256(png).hexdigest() == record["sha256"]
        assert open(os.path.join(folder, record["path"]), "rb").read() == png
    texts = [r for r in records if r["kind"] == "text"]
    found = events.Tensors("note/text_summary") if texts else []
    found = {event.step: event for event in found}      # this reader does not void what a resumed run replaces
    found = [found[step] for step in sorted(found)]
    assert len(found) >= len(texts) - short
    for event, record in zip(found, texts):
        assert event.tensor_proto.string_val[0].decode() == record["text"]
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    parameters = plugin_data_pb2.HParamsPluginData.FromString(start)
    for record in records:
        if record["kind"] == "config":
            value = parameters.session_start_info.hparams[record["key"]]
            assert getattr(value, value.WhichOneof("kind")) == record["value"] or record["key"] == "resumed", record
    if records[-1]["kind"] == "end" and not short:
        end = events.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
        assert plugin_data_pb2.HParamsPluginData.FromString(end).session_end_info.status == 1
    return f"TensorBoard: {count} scalars, {len(histograms)} histograms, {len(images)} images, {len(texts)} texts"


def of_json(text):
    return json.loads(text, parse_constant=nonfinite)


def read_datastore(path, start, short):
    """What W&B's datastore.py finds: rows by step, config, summary, exit code, media, and a sentence."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal import datastore
    store, found, numbers = datastore.DataStore(), collections.defaultdict(list), []
    store.open_for_scan(path)
    try:
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record.FromString(data)
            found[record.WhichOneof("record_type")].append(record)
            numbers.append(record.num)
    except AssertionError:              # its way of saying that the last record is torn
        assert short
    assert numbers == sorted(set(numbers)), "record numbers rise"
    run = found["run"][0].run
    assert (run.run_id, run.project, run.display_name) == (start["id"], start["project"], start["name"])
    assert run.start_time.seconds == start["began"] and len(found["run"]) == len(found["header"]) == 1
    rows, step = {}, -1
    for record in found["history"]:
        row = {item.key: of_json(item.value_json) for item in record.history.item}
        assert row["_step"] == record.history.step.num > step
        step = row["_step"]
        rows[step] = row
    config = {i.key: of_json(i.value_json) for record in found["config"] for i in record.config.update}
    summary = {i.key: of_json(i.value_json) for record in found["summary"] for i in record.summary.update}
    codes = [record.exit.exit_code for record in found["exit"]]
    media = {file.path for record in found["files"] for file in record.files.files}
    return rows, config, summary, codes[0] if codes else None, media, f"{len(numbers)} records"


class Server(http.server.BaseHTTPRequestHandler):
    """Says yes to what `wandb sync` asks, and keeps what it sends."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def do_GET(self):
        self.answer({})

    def do_PUT(self):
        self.server.kept["files"][self.path.removeprefix("/storage/")] = self.body()
        self.answer({})

    def do_POST(self):
        data, kept = self.body(), self.server.kept
        if "graphql" in self.path:
            self.answer({"data": self.graphql(json.loads(data), kept)})
            return
        if self.path.endswith("/file_stream"):
            sent = json.loads(data)
            history = sent.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for i, line in enumerate(history["content"]):
                kept["lines"][history["offset"] + i] = of_json(line)
            if sent.get("complete"):
                kept["exit"] = sent["exitcode"]
        self.answer({"exitcode": None, "limits": {}})

    def graphql(self, question, kept):
        query, given = question["query"], question.get("variables") or {}
        if "upsertBucket" in query:
            if given.get("config"):
                kept["config"] = {key: v.get("value") for key, v in json.loads(given["config"]).items()}
            project = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "r", "name": given.get("name") or "r", "displayName": given.get("displayName"),
                      "description": None, "config": None, "sweepName": None, "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            port = self.server.server_address[1]
            files = [{"name": f, "uploadUrl": f"http://127.0.0.1:{port}/storage/{f}"} for f in given.get("files", [])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        viewer = {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "model": None, "project": None,
                "serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0"}, "features": []}}


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):         # a connection that W&B dropped
        pass


def read_sync(path, start, short):
    """What `wandb sync` uploads; like read_datastore."""
    server = QuietServer(("127.0.0.1", 0), Server)
    server.kept = {"lines": {}, "files": {}, "config": {}, "exit": None}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = dict(os.environ, WANDB_BASE_URL=f"http://127.0.0.1:{server.server_address[1]}", WANDB_ENTITY="e",
                       WANDB_API_KEY="a" * 40, WANDB_DIR=os.path.dirname(path), WANDB_ERROR_REPORTING="false")
    environment.pop("PYTHONPATH", None)
    command = [os.path.join(os.path.dirname(sys.executable), "wandb"), "sync", os.path.dirname(path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    server.shutdown()
    said = done.stdout.decode()
    assert "Finished syncing" in said or (short and "ends with an incomplete record" in said), said
    for mark in glob.glob(path + ".sync*"):
        os.remove(mark)
    kept = server.kept
    rows = {row["_step"]: row for row in kept["lines"].values()}
    assert len(rows) == len(kept["lines"]) == max(kept["lines"]) + 1
    media = {name: data for name, data in kept["files"].items() if name.startswith("media/")}
    for name, data in media.items():
        assert data == open(os.path.join(os.path.dirname(path), "files", name), "rb").read()
    summary = of_json(kept["files"].get("wandb-summary.json", b"{}").decode())
    return rows, kept["config"], summary, kept["exit"], set(media), f"{len(media)} media files uploaded"


def check_wandb(folder, records, short, reader):
    path, = glob.glob(os.path.join(folder, "wandb", "offline-run-*", "run-*.wandb"))
    rows, config, summary, code, media, said = reader(path, records[0], short)
    count = 0
    for tag, expected in scalars_of(records).items():
        steps = [at for at, _ in expected]
        for at, value in expected:
            if at in rows:
                assert same(float(rows[at][tag]), value), (tag, at, rows[at])
                count += 1
        missing = [at for at in steps if at not in rows]
        assert missing == steps[len(steps) - len(missing):] and len(missing) <= short, (tag, missing)
    for record in records:
        row = rows.get(record.get("step"))
        if row is None:
            continue
        if record["kind"] == "histogram":
            assert row["weights"]["values"] == record["counts"]
            assert len(row["weights"]["bins"]) == len(record["counts"]) + 1
        if record["kind"] == "text":
            assert row["note"] == record["text"]
        if record["kind"] == "image":
            image = row["slice/mu_a"]
            assert all(image[key] == record[key] for key in ("width", "height", "sha256")) and image["path"] in media
            data = open(os.path.join(os.path.dirname(path), "files", image["path"]), "rb").read()
            assert hashlib.sha256(data).hexdigest() == image["sha256"] and len(data) == image["size"]
    for record in records:
        if record["kind"] == "config" and record["key"] != "resumed":
            assert config[record["key"]] == record["value"]
    if records[-1]["kind"] == "end" and not short:
        assert code == 0
        for tag, values in scalars_of(records).items():
            assert same(float(summary[tag]), values[-1][1])
    return f"{count} scalars in {len(rows)} rows, {said}"


def check(folder, title, short=0):
    records, torn = read_json(folder)
    print(f"{title}:\n  JSON lines: {len(records)} records{', and %d bytes of a torn one' % torn if torn else ''}")
    print("  " + check_tensorboard(folder, records, short))
    if have_datastore:
        print("  W&B's datastore.py: " + check_wandb(folder, records, short, read_datastore))
    print("  wandb sync: " + check_wandb(folder, records, short, read_sync))


def cut_tails(folder):
    for path in [*glob.glob(os.path.join(folder, "events*")), *glob.glob(os.path.join(folder, "wandb/*/*.wandb"))]:
        os.truncate(path, os.path.getsize(path) - 20)


def check_torn(folder, title):
    with tempfile.TemporaryDirectory() as work:
        copy = os.path.join(work, os.path.basename(os.path.normpath(folder)))
        shutil.copytree(folder, copy)
        cut_tails(copy)                 # not of the JSON lines, which the others are compared with
        check(copy, title + ", 20 bytes cut from the tails", short=1)
        path = os.path.join(copy, "log.jsonl")
        os.truncate(path, os.path.getsize(path) - 20)
        records, torn = read_json(copy)
        assert torn > 0 and len(records) == len(read_json(folder)[0]) - 1


def made(work):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program, folder = os.path.join(work, "writer"), os.path.join(work, "runs", "a")
    with open(program + ".c", "w") as file:
        file.write(WRITER)
    command = [os.environ.get("CC", "cc"), "-O1", "-std=c99", "-I", root, "-o", program, program + ".c", "-lm",
               "-pthread"]
    subprocess.run(command, check=True)
    subprocess.run([program, folder], check=True)
    check(folder, "a run")
    check_torn(folder, "a run")
    subprocess.run([program, folder, "1500", "2200", "killed"], check=True)
    check(folder, "resumed at step 1500, without an end")
    check_torn(folder, "resumed at step 1500, without an end")
    cut_tails(folder)
    with open(os.path.join(folder, "log.jsonl"), "ab") as file:
        file.write(b'{"kind":"scalars","ti')
    subprocess.run([program, folder, "2100", "2300"], check=True)
    check(folder, "torn, and resumed at step 2100")
    check_torn(folder, "torn, and resumed at step 2100")


if __name__ == "__main__":
    if os.environ.get("WANDB_OLD"):
        sys.path.insert(0, os.environ["WANDB_OLD"])
    try:
        from wandb.sdk.internal import datastore        # noqa: F401
        have_datastore = True
    except ImportError:
        have_datastore = False
    if len(sys.argv) > 1:
        check(sys.argv[1], sys.argv[1])
        check_torn(sys.argv[1], sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            made(folder)
    print("all read")
