//! Measures membership beside foca on one network model and writes docs/membership-report.md.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use protocol::membership::MembershipConfig;
use sim::measure::{
    Bandwidth, Evictions, Foca, Ours, System, Times, bandwidth, detection, join, lossy, stalls,
};
use sim::scenario::Scenario;

/// Runs everything that docs/membership-report.md states. Hours with the defaults, minutes with
/// `--sizes 100,1000 --probes 100000 --mixed 50`.
#[derive(Parser)]
struct Arguments {
    #[arg(long, value_delimiter = ',', default_value = "100,1000,10000")]
    sizes: Vec<usize>,
    /// Probe rounds at 5 % loss.
    #[arg(long, default_value_t = 10_000_000)]
    probes: u64,
    /// Seeds of mixed faults.
    #[arg(long, default_value_t = 1000)]
    mixed: u64,
    /// Nodes that join at once.
    #[arg(long, default_value_t = 2000)]
    joiners: usize,
    #[arg(long, default_value = "docs/membership-report.md")]
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let begun = Instant::now();
    let mut report = HEAD.to_owned();
    detection_table(&mut report, &arguments.sizes)?;
    bandwidth_table(&mut report, &arguments.sizes)?;
    stall_table(&mut report)?;
    lossy_lines(&mut report, arguments.probes)?;
    join_lines(&mut report, arguments.joiners)?;
    mixed_lines(&mut report, arguments.mixed)?;
    writeln!(
        report,
        "\nThe whole took {:.0} min on one core.",
        begun.elapsed().as_secs_f64() / 60.0
    )?;
    let path = &arguments.out;
    std::fs::write(path, report).with_context(|| format!("cannot write {}", path.display()))
}

fn detection_table(report: &mut String, sizes: &[usize]) -> anyhow::Result<()> {
    report.push_str(
        "\n## A crash is known by all survivors\n\nSeconds from the crash until the last survivor holds the node for dead.\n\n\
         | nodes | goal p99 | ours p50 | p99 | slowest | foca p50 | p99 | crashes (ours, foca) |\n|---|---|---|---|---|---|---|---|\n",
    );
    for &nodes in sizes {
        let (worlds, crashes) = match nodes {
            0..=200 => (20, 10),
            201..=2000 => (4, 50),
            _ => (1, 60),
        };
        let ours = all_detections(&Ours::default(), nodes, worlds, crashes);
        let foca_crashes = if nodes > 2000 { 20 } else { crashes };
        let foca = all_detections(&Foca, nodes, worlds, foca_crashes);
        let goal = match nodes {
            0..=100 => "≤ 3",
            101..=1000 => "≤ 4.5",
            _ => "≤ 6",
        };
        writeln!(
            report,
            "| {nodes} | {goal} | {} | {} | {} | {} | {} | {}, {} |",
            shown(&ours, 0.5),
            shown(&ours, 0.99),
            shown(&ours, 1.0),
            shown(&foca, 0.5),
            shown(&foca, 0.99),
            ours.len(),
            foca.len(),
        )?;
    }
    Ok(())
}

fn all_detections<S: System>(system: &S, nodes: usize, worlds: u64, crashes: usize) -> Times {
    let mut times = Times::default();
    for seed in 0..worlds {
        times.merge(&detection(system, seed, nodes, crashes));
        eprintln!("detection, {nodes} nodes, world {seed} done");
    }
    times
}

fn shown(times: &Times, share: f64) -> String {
    times.quantile(share).map_or("not by all".to_owned(), |s| format!("{s:.2}"))
}

fn bandwidth_table(report: &mut String, sizes: &[usize]) -> anyhow::Result<()> {
    report.push_str(
        "\n## Bytes that a node sends in a second\n\nIPv4 and UDP headers (28 bytes a datagram) included; QUIC adds about 30 a datagram to both.\n\n\
         | nodes | loss | goal | ours mean | busiest node | datagrams/s | foca mean | busiest node |\n|---|---|---|---|---|---|---|---|\n",
    );
    for &nodes in sizes {
        for (loss, goal) in [(0.0, "≤ 500"), (0.05, "≤ 3,000")] {
            let seconds = if nodes > 2000 { 20 } else { 60 };
            let ours: Bandwidth = bandwidth(&Ours::default(), 1, nodes, loss, seconds);
            let foca = bandwidth(&Foca, 1, nodes, loss, seconds);
            eprintln!("bandwidth, {nodes} nodes, loss {loss} done");
            writeln!(
                report,
                "| {nodes} | {:.0} % | {goal} | {:.0} | {:.0} | {:.1} | {:.0} | {:.0} |",
                loss * 100.0,
                ours.mean,
                ours.most,
                ours.datagrams_per_s,
                foca.mean,
                foca.most,
            )?;
        }
    }
    Ok(())
}

fn stall_table(report: &mut String) -> anyhow::Result<()> {
    report.push_str(
        "\n## A tenth of the mesh stalls\n\n200 nodes; 20 of them stall again and again, with 1 to 10 s between, for 150 s. A stalled node runs nothing, then its \
         timers and packets at once. Evictions: a node declared dead by anyone, counted once for all that believe it. Those of stalled nodes are \
         no error (they were silent for longer than a crash takes to be known), but they must return.\n\n\
         | stall | seeds | goal | ours: healthy evicted | stalled evicted | suspicions of healthy | foca: healthy evicted | stalled evicted |\n|---|---|---|---|---|---|---|---|\n",
    );
    for stall_s in [1.0, 3.0, 10.0] {
        const SEEDS: u64 = 5;
        let (mut ours, mut foca) = (Vec::new(), Vec::new());
        for seed in 0..SEEDS {
            ours.push(stalls(&Ours::default(), seed, 200, stall_s));
            foca.push(stalls(&Foca, seed, 200, stall_s));
            eprintln!("stalls of {stall_s} s, seed {seed} done");
        }
        let sum = |all: &[Evictions], f: fn(&Evictions) -> usize| {
            all.iter().map(f).sum::<usize>() as f64 / SEEDS as f64
        };
        writeln!(
            report,
            "| {stall_s} s | {SEEDS} | ≤ 2 | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} |",
            sum(&ours, |e| e.healthy),
            sum(&ours, |e| e.stalled),
            sum(&ours, |e| e.suspicions_healthy as usize),
            sum(&foca, |e| e.healthy),
            sum(&foca, |e| e.stalled),
        )?;
    }
    report.push_str("\nMeans over the seeds.\n");
    Ok(())
}

fn lossy_lines(report: &mut String, probes: u64) -> anyhow::Result<()> {
    let Evictions { healthy, suspicions_healthy, probes, .. } =
        lossy(&MembershipConfig::default(), 1, 1000, 0.05, probes);
    eprintln!("loss done");
    writeln!(
        report,
        "\n## Healthy nodes evicted at 5 % loss\n\n1,000 nodes, {probes} probe rounds: **{healthy}** evicted (goal: 0 in 10^7); {suspicions_healthy} times one node held a healthy one for suspect.",
    )?;
    Ok(())
}

fn join_lines(report: &mut String, joiners: usize) -> anyhow::Result<()> {
    let (ours, most) = join(&Ours::default(), 1, joiners, 60);
    eprintln!("join done: {ours:?}");
    let (foca, foca_most) = join(&Foca, 1, joiners, 60);
    let shown =
        |done: Option<f64>| done.map_or("not within 60 s".to_owned(), |s| format!("{s:.2} s"));
    writeln!(
        report,
        "\n## {joiners} nodes join at once by one seed\n\nEvery view complete after: ours {} (goal: < 10 s), the busiest node sent {:.1} MB; foca {}, {:.1} MB.",
        shown(ours),
        most as f64 / 1e6,
        shown(foca),
        foca_most as f64 / 1e6,
    )?;
    Ok(())
}

fn mixed_lines(report: &mut String, seeds: u64) -> anyhow::Result<()> {
    let (mut failed, mut events) = (Vec::new(), 0);
    let begun = Instant::now();
    for seed in 0..seeds {
        let scenario = Scenario::mixed(seed);
        let outcome = scenario.simulate(false);
        events += outcome.world.events;
        if let Err(why) = scenario.judge(&outcome) {
            failed.push(format!("- seed {seed}: {why:#}"));
        }
    }
    let rate = events as f64 / begun.elapsed().as_secs_f64() / 1e6;
    writeln!(
        report,
        "\n## Mixed faults\n\n{seeds} seeds: a minute of random faults (crashes, restarts with kept, old and wiped disks, stalls, partitions, one-way links, loss, drifting clocks, noise, lying disks), then calm. \
         No ghost may come back, all bounds must hold, and {} s after the last fault every view must be complete and right. **{} failed.** {events} events, {rate:.2} million a second.\n{}",
        sim::scenario::CONVERGED_WITHIN_S,
        failed.len(),
        failed.join("\n"),
    )?;
    Ok(())
}

const HEAD: &str = "# Membership, measured\n\n\
Made by `cargo run --release -p grapevine-sim --bin membership-report`; do not edit. The machine is the daemon's, the world is simulated \
([membership.md](membership.md)).\n\n\
Links: one-way delay 2 ms plus an exponential part of mean 8 ms (at most 82 ms), which reorders. Ours: the defaults. foca 2.0.0, \
tightened: probe period 400 ms, probe timeout 120 ms, 3 indirect probes, suspicion `0.4 s x log10(n)`, gossip to 3 each 100 ms, \
`4 x log10(n)` transmissions, announcements to the dead each 2 s, down members notified, identities that renew themselves. Its identities \
take 10 bytes on the wire, ours 32.\n";
