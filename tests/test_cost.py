"""The arithmetic of cost, and the command: what a run, a million tokens and hours of service cost."""

import json
from pathlib import Path

import pytest

from gemma_tpu.cli import main
from gemma_tpu.costs import cost, cost_sources
from gemma_tpu.costs.cost import Serving, Side, Training
from gemma_tpu.hardware import chips, prices

RUN = Training(chips.find("v5p-8"), 10.0, 36e6, True, "a test")
SERVER = Serving(chips.find("v6e-8"), 1000.0, True, "a test")
CONFIG = "configs/gemma4_31b_v5p8_fast.yaml"


def line(name: str, fixed: float, rate: float) -> Side:
    return Side(name, None, SERVER, "on-demand", {"training": fixed}, {"serving": rate})


# --- spot ---


def test_without_preemptions_only_the_saves_are_added():
    found = cost.preempted(10, prices.load(overrides=["spot.preemptions_per_hour=0", "spot.save_seconds=36",
                                                      "spot.checkpoint_minutes=60"]))  # fmt: skip
    assert found.hours == pytest.approx(10 * (1 + 0.01)) and found.preemptions == 0


def test_preemptions_cost_what_a_simulation_says():
    """Exponential times between failures, work lost since the last checkpoint, a restart for each."""
    import random

    given = ["spot.preemptions_per_hour=0.5", "spot.save_seconds=60", "spot.checkpoint_minutes=30",
             "spot.restart_minutes=12"]  # fmt: skip
    draw, total, runs = random.Random(1), 0.0, 4000
    for _ in range(runs):
        for _ in range(20):  # segments of half an hour and their save
            while (until := draw.expovariate(0.5)) < 0.5 + 1 / 60:
                total += until + 0.2
            total += 0.5 + 1 / 60
    found = cost.preempted(10, prices.load(overrides=given))
    assert found.hours == pytest.approx(total / runs, rel=0.02)
    assert found.factor == pytest.approx(found.hours / 10)


def test_the_best_interval_is_the_cheapest_of_those_around_it():
    def hours(minutes: float) -> float:
        return cost.preempted(1000, prices.load(overrides=[f"spot.checkpoint_minutes={minutes}"])).hours

    best = cost.preempted(1000, prices.load()).best_checkpoint_minutes
    assert hours(best) < min(hours(best / 2), hours(best * 2))


# --- break-even ---


@pytest.mark.parametrize(("a", "b", "at", "before", "after"), [
    ((100, 1), (0, 3), 50, "b", "a"), ((0, 3), (100, 1), 50, "a", "b"), ((1, 1), (2, 2), None, "a", "a"),
    ((2, 2), (1, 2), None, "b", "b"), ((1, 2), (1, 1), None, "b", "b"), ((1, 1), (1, 1), None, "", ""),
])  # fmt: skip
def test_break_even_is_where_two_lines_cross(a, b, at, before, after):
    found = cost.break_even("a", *a, "b", *b)
    assert (found.at, found.before, found.after) == (at, before, after)
    if at is not None:
        assert line("a", *a).after_hours(at) == line("b", *b).after_hours(at)
        assert line(before, *(a if before == "a" else b)).after_hours(at / 2) < line(
            after, *(b if before == "a" else a)).after_hours(at / 2)  # fmt: skip


def test_tokens_and_hours_of_a_busy_server_are_the_same_money():
    one = line("a", 50, 20)
    assert one.after_tokens(SERVER.tokens_per_hour * 7) == pytest.approx(one.after_hours(7))
    assert SERVER.chip_hours_per_million == pytest.approx(8 / 3.6)


def test_buying_pays_from_the_utilisation_at_which_both_hours_cost_the_same():
    place = chips.find("h100x8")
    share = cost.utilisation_that_pays(place, prices.load())
    at = prices.load(overrides=[f"own.utilisation={share}"])
    assert at.hour(place, "own").usd == pytest.approx(at.hour(place).usd)


def test_an_optimisation_is_repaid_or_never():
    before, after = SERVER, Serving(SERVER.place, 2000.0, True, "")
    good = cost.Optimisation(before, after, 6.0, 3.0, 1200.0)
    assert good.repaid_after_tokens == 400e6 and good.repaid_after_days(50e6) == 8
    assert cost.Optimisation(after, before, 3.0, 6.0, 1200.0).repaid_after_tokens is None


def test_a_side_adds_what_is_paid_once_and_by_the_hour():
    found = cost.side("a", RUN, SERVER, prices.load(), "on-demand", engineering_hours=2, storage_gb=730)
    assert found.once == {"training": pytest.approx(168.0), "engineering": 200.0}
    assert found.hourly == {"serving": pytest.approx(21.6), "storage": pytest.approx(0.02)}
    assert found.training.usd_per_million(168.0) == pytest.approx(168 / 36)
    assert RUN.chip_hours == 40 and RUN.tokens_per_s == 1000


# --- the command ---


def run(capsys, *words: str) -> tuple[int, dict, str]:
    code = main(["cost", *words, "--json"])
    seen = capsys.readouterr()
    return code, json.loads(seen.out), seen.err


def bench(file, rate=1000.0, p99=200.0, **more):
    tree = {"completed": 100, "failed": 0, "duration": 51.2, "output_throughput": rate, "total_input_tokens": 102_400,
            "total_output_tokens": 51_200, "ttft_ms": {"p50": 50.0, "p90": 90.0, "p99": p99},
            "e2e_ms": {"p50": 9000.0}, "goodput": 1.0, "saturation_qps": 2.0}  # fmt: skip
    file.write_text(json.dumps(tree | more))
    return str(file)


def test_the_papers_runs_by_the_ordinary_way(capsys):
    code, found, _ = run(capsys, "paper:tpu", "--serve", "paper:tpu/512", "--against-training", "paper:gpu",
                         "--against-serve", "paper:gpu/512", "--prices", "paper-2026-05")  # fmt: skip
    assert code == 0 and round(found["training_usd"], 2) == 56.11
    assert round(found["usd_per_million_tokens"], 2) == 6.12
    assert round(found["serving_usd_per_million_tokens"], 2) == 4.26
    assert found["sides"][1]["total_usd"]["hours"]["24"] == pytest.approx(650.11, abs=0.005)
    # Dearer training and a cheaper million: the GPU side catches up over tokens, never over hours.
    assert found["break_even"]["hours"] == {"at": None, "cheaper_before": found["sides"][0]["name"],
                                            "cheaper_after": found["sides"][0]["name"]}  # fmt: skip
    tokens = (22.12 * 5.39 - 16.80 * 3.34) / (21.52 / 1403 - 22.12 / 1490) * 3600
    assert found["break_even"]["tokens"]["at"] == pytest.approx(tokens)


def test_the_papers_tables_are_printed_and_counted(capsys):
    assert main(["cost", "--prices", "paper-2026-05", "--paper"]) == 0
    said = capsys.readouterr().out
    assert "6.12 !" in said and "12.64 !" in said and "1.14" in said
    _, found, _ = run(capsys, "--paper")
    assert len(found["tables"]) == 3 and len(found["discrepancies"]) == 22
    assert found["training_usd"] == pytest.approx(56.112)


def test_a_config_is_planned_and_its_rivals_too(capsys):
    code, found, _ = run(capsys, CONFIG, "--against", "h100x2", "--serve-on", "v6e-8", "--storage-gb", "100")
    first, second = found["sides"]
    assert code == 0 and first["training"]["slice"] == "v5p-8" and second["serving"]["slice"] == "h100x2"
    assert found["training_usd"] == pytest.approx(first["training"]["hours"] * 16.80)
    assert not first["training"]["measured"] and "schedules of XLA's GPU compiler" in second["training"]["source"]
    assert first["training"]["usd"]["spot"][0] < first["training"]["usd"]["spot"][1] < found["training_usd"]


def test_a_plan_made_elsewhere_is_taken_at_its_word(capsys, tmp_path):
    plan = {"slice": "v6e-8", "hours": 2.0, "tokens": 1e7, "fits": True, "basis": "schedule", "workload": "w"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    _, found, _ = run(capsys, str(tmp_path / "plan.json"))
    assert found["training_usd"] == pytest.approx(2 * 21.6)
    assert found["usd_per_million_tokens"] == pytest.approx(4.32)


def measured_run(folder, kind="TPU v5", devices=4):
    """A run folder as a v5p-8 leaves it: 60 updates of 60 s."""
    from gemma_tpu import config

    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(config.load(CONFIG)))
    rows = [{"step": n + 1, "tokens": 60_000, "tokens_per_s": 1000.0} for n in range(60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"device_kind": kind, "devices": devices}))
    return str(folder)


def test_a_run_is_priced_by_what_it_measured(capsys, tmp_path):
    folder = measured_run(tmp_path / "run")
    _, found, _ = run(capsys, folder, "--pay", "spot", "spot.preemptions_per_hour=0", "spot.save_seconds=0")
    one = found["sides"][0]["training"]
    assert one["measured"] and one["hours"] == pytest.approx(1.0) and one["slice"] == "v5p-8"
    assert found["training_usd"] == pytest.approx(4 * (0.93 + 1.68) / 2)
    assert found["usd_per_million_tokens"] == pytest.approx(found["training_usd"] / 3.6)


def test_a_bench_of_ours_and_of_vllm_give_the_same(capsys, tmp_path):
    ours = bench(tmp_path / "ours.json")
    theirs = bench(tmp_path / "vllm.json", ttft_ms=None, e2e_ms=None, median_ttft_ms=50.0, p90_ttft_ms=90.0,
                   p99_ttft_ms=200.0, median_e2el_ms=9000.0)  # fmt: skip
    on = ["--serve-on", "v6e-8", "--model", "gemma-4-31B-it"]
    results = [run(capsys, "--serve", file, *on)[1]["sides"][0]["serving"] for file in (ours, theirs)]
    sources = [one.pop("source") for one in results]
    assert results[0] == results[1] and "100 requests measured" in sources[0]
    assert results[0]["accelerator_hours_per_million_tokens"] == pytest.approx(8 / 3.6)
    assert results[0]["latency_ms"]["ttft"]["p99"] == 200.0
    assert 0 < results[0]["utilisation"]["mfu"] < results[0]["utilisation"]["of_bound"] < 1


def test_of_a_sweep_the_point_at_the_asked_rate_is_taken(capsys, tmp_path):
    """As `gemma-tpu bench --json` prints it: the best point on top, all of them below."""
    def point(qps, rate):
        figures = {"output_throughput": rate, "completed": 30, "failed": 0, "duration": 9.0}
        return figures | {"input": 512, "output": 256, "qps": qps, "ttft_ms": {"p50": qps * 1.0, "p99": None}}

    points = [point(1, 200.0), point(8, 900.0)]
    tree = {**points[1], "point": {"input": 512, "output": 256, "qps": 8}, "on": "v6e-8", "flags": ["too short"],
            "points": points}  # fmt: skip
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(tree))
    best, low = (run(capsys, "--serve", str(file), "--model", "gemma-4-31B-it", *more)[1]["sides"][0]["serving"]
                 for more in ([], ["--at", "1"]))  # fmt: skip
    assert best["output_tokens_per_s"] == 900 and low["output_tokens_per_s"] == 200
    assert low["latency_ms"]["ttft"] == {"p50": 1.0} and low["prompt_tokens_per_s"] == 400
    assert "too short" in best["source"] and "of 2 (--at QPS" in best["source"] and "at 1 a second" in low["source"]
    assert main(["cost", "--serve", str(file), "--at", "3"]) == 2
    assert "has no point at that rate; it has 1, 8" in capsys.readouterr().err


def test_before_and_after_say_when_it_is_repaid_and_what_became_worse(capsys, tmp_path):
    before, after = bench(tmp_path / "b.json", 500.0), bench(tmp_path / "a.json", 1000.0, p99=900.0)
    words = ["--before", before, "--serve", after, "--serve-on", "v6e-8", "--effort-hours", "12",
             "--tokens-per-day", "1e7"]  # fmt: skip
    _, found, _ = run(capsys, *words)
    one = found["optimisation"]
    saved = 21.6 / 1.8 - 21.6 / 3.6
    assert one["saved_usd_per_million_tokens"] == pytest.approx(saved)
    assert one["repaid_after_days"] == pytest.approx(1200 / saved * 1e6 / 1e7)
    main(["cost", *words])
    said = capsys.readouterr().out
    assert "p99 of TTFT became worse: 200 to 900 ms" in said and "repaid after 200M tokens, 20 days" in said
    main(["cost", "--before", after, "--serve", before, "--serve-on", "v6e-8", "--effort-hours", "12"])
    assert "it is never repaid" in capsys.readouterr().out


def test_pages_keep_prediction_and_measurement_apart(capsys, tmp_path):
    import test_page

    from gemma_tpu.costs import cost_page

    for number, words in enumerate((["paper:tpu", "--serve", "paper:tpu/512", "--against", "h100x2"],
                                    [CONFIG, "--serve-on", "v6e-8", "--against-training", "paper:gpu"],
                                    ["--paper"])):  # fmt: skip
        file = tmp_path / f"{number}.html"
        code = main(["cost", *words, "--html", str(file)])
        if number == 0:  # a run of the paper cannot be planned for another slice
            assert code == 2 and "--against-training" in capsys.readouterr().err
            continue
        text = file.read_text()
        test_page.check(text)
        shades = {"predicted": set(), "measured": set()}
        for tag in ("rect", "circle"):
            for each in test_page.drawn(text, tag):
                colour, state = each["class"].split()
                shades.setdefault(state, set()).add(int(colour[1:]))
        assert not shades["predicted"] & shades["measured"]
        assert shades["measured"] <= set(cost_page.MEASURED)


@pytest.mark.parametrize(("words", "rule"), [
    ([], "the cost of what?"), (["--serve", "no.json"], "no.json: cannot be read"),
    (["--serve", "no.json", "--serve-on", "v6e-8"], "no.json: cannot be read"),
    (["--serve-on", "v6e-8"], "which model is served?"),
    (["--serve-on", "v6e-1", "--model", "gemma-4-31B-it"], "cannot serve"),
    (["--serve-on", "v6e-8", "--model", "gemma-4-31B-it", "--load", "8"], "--load 8: must be IN/OUT"),
    (["--serve-on", "v6e-8", "--model", "gemma-4-31B-it", "--load", "8/8@99999"], "not 99999"),
    ([CONFIG, "--pay", "own"], "TPUs are rented, not sold"),
    ([CONFIG, "engineering.usd=1"], "did you mean engineering.usd_hour?"),
    ([CONFIG, "optim.lrr=1"], "did you mean optim.lr?"), ([CONFIG, "--on", "v6e-1"], "does not fit v6e-1"),
    ([CONFIG, "--effort-hours", "3"], "--effort-hours needs --before BENCH"),
    ([CONFIG, "--against-pay", "spot"], "--against-pay needs --against SLICE"),
    ([CONFIG, "--before", "x.json"], "--before needs --serve"),
    (["paper:cpu"], "the paper measured paper:tpu, paper:gpu"), (["--paper", CONFIG], "--paper: stands alone"),
    (["--paper", "--prices", "catalogue-2026-11"], "must be paper-2026-05"),
    (["train.steps=3"], "the cost of what?"), ([CONFIG, "--load", "1/1"], "--load needs --serve-on SLICE"),
    ([CONFIG, "--storage-gb", "9", "--hours", "3"], "--storage-gb needs --serve BENCH or --serve-on SLICE"),
    (["--serve", "paper:tpu/512", "--at", "4"], "is one point of the paper"),
    (["--paper", "--pay", "spot"], "leave out pay=spot"),
    (["optim.lr=3", "--serve-on", "v6e-8"], "no config that this could change"),
])  # fmt: skip
def test_a_wrong_call_is_one_clear_message(capsys, words, rule):
    assert main(["cost", *words]) == 2
    seen = capsys.readouterr()
    assert rule in seen.err and "Traceback" not in seen.err


def test_files_that_are_something_else_are_refused(capsys, tmp_path):
    other = tmp_path / "other.json"
    for text, rule in (("[1]", "not a JSON object"), ("{", "not valid JSON"), ("{}", "no key 'slice'"),
                       ('{"sweep": []}', "a sweep has many slices"),
                       ('{"slice": "v6e-8", "hours": 1, "fits": false}', "does not fit v6e-8"),
                       ('{"slice": "v6e-8", "hours": null, "fits": true}', "did not know how long"),
                       ('{"slice": "v6e-8", "hours": "1 h", "fits": true}', "hours is '1 h': it must be a number"),
                       ('{"slice": "v6e-8", "hours": 1, "tokens": [], "fits": true}', "tokens is []"),
                       ('{"slice": [8], "hours": 1, "fits": true}', "[8]")):  # fmt: skip
        other.write_text(text)
        assert main(["cost", str(other)]) == 2 and rule in capsys.readouterr().err
    other.write_text('{"output_throughput": 5, "ttft_ms": {"p50": 1}}')
    assert main(["cost", "--serve", str(other)]) == 2
    assert "on which slice was it measured?" in capsys.readouterr().err
    other.write_text('{"output_throughput": 5, "ttft_ms": {"p50": 1}, "points": [1, 2], "point": 3}')
    assert main(["cost", "--serve", str(other), "--serve-on", "v6e-8", "--at", "1"]) == 2
    assert "is no sweep" in capsys.readouterr().err
    assert main(["cost", "--serve", str(other), "--serve-on", "v6e-8"]) == 0
    other.write_text('{"output_throughput": 0}')
    assert main(["cost", "--serve", str(other), "--serve-on", "v6e-8"]) == 2
    assert "output_throughput is 0" in capsys.readouterr().err
    folder = measured_run(tmp_path / "run", "cpu", 1)
    assert main(["cost", folder]) == 2 and "no slice with a price" in capsys.readouterr().err


def test_the_file_that_a_bench_keeps_says_what_its_json_says(capsys, tmp_path):
    kept = Path(__file__).parent / "fixtures/bench_sweep.json"
    assert main(["bench", str(kept), "--json"]) == 0
    said = tmp_path / "said.json"
    said.write_text(capsys.readouterr().out)
    one, other = (cost_sources.bench(str(path), "v6e-8", None) for path in (kept, said))
    assert one.output_tokens_per_s == other.output_tokens_per_s > 0
    assert cost_sources.bench(str(kept), "v6e-8", None, at="5").output_tokens_per_s == pytest.approx(78.4066)
