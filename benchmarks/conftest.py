"""Print a table of rates after the benchmarks of ops.py."""


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    timed = [bench for bench in getattr(session, "benchmarks", []) if "rate" in bench.extra_info]
    groups: dict[str, list] = {}
    for bench in timed:
        groups.setdefault(bench.group, []).append(bench)
    if not groups:
        return
    terminalreporter.write_line(
        f"\n{'op':<32}{'form':<24}{'ms':>9}{'rate':>10}{'':<9}{'of ceiling':>10}{'fastmim is':>12}"
    )
    for group, benches in groups.items():
        ours = next((b.stats.median for b in benches if b.params["form"] == "fastmim"), None)
        for bench in benches:
            info, median = bench.extra_info, bench.stats.median
            ratio = f"{median / ours:.2f}x" if ours else ""
            terminalreporter.write_line(
                f"{group:<32}{bench.params['form']:<24}{1e3 * median:>9.3f}{info['rate']:>10.1f} {info['unit']:<8}"
                f"{100 * info['share']:>9.0f}%{ratio:>12}"
            )
