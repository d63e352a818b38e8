//! Measures membership beside foca on one network model and writes docs/membership-report.md.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use protocol::membership::MembershipConfig;
use sim::measure::{
    Evictions, Foca, Ours, System, Times, bandwidth, detection, join, lossy, stalls,
};
use sim::scenario::{CONVERGED_WITHIN_S, Scenario};

/// Runs everything that docs/membership-report.md states: about a quarter of an hour on one core, and
/// 6 GiB of memory while views of 10,000 nodes are kept. What it is at goes to standard error.
#[derive(Parser)]
struct Arguments {
    /// Only these parts; the others stay as they are in the file.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Part>,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Detection,
    Bandwidth,
    Stalls,
    Loss,
    Join,
    Mixed,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let path = &arguments.out;
    let before = std::fs::read_to_string(path).unwrap_or_default();
    let mut report = HEAD.to_owned();
    for part in Part::value_variants() {
        if arguments.only.is_empty() || arguments.only.contains(part) {
            let begun = Instant::now();
            report.push_str(&arguments.section(*part)?);
            eprintln!("{part:?} done: {:.0} s", begun.elapsed().as_secs_f64());
        } else if let Some(section) = section_of(&before, part.title()) {
            report.push_str(section);
        }
    }
    // Whole or not at all.
    let unfinished = path.with_extension("new");
    std::fs::write(&unfinished, report)
        .and_then(|()| std::fs::rename(&unfinished, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Says how far a measurement is, each tenth of it.
fn progress(what: String) -> impl FnMut(f64) {
    let begun = Instant::now();
    let mut said = -1.0;
    move |share: f64| {
        let tenth = (share * 10.0).floor();
        if tenth > said {
            said = tenth;
            eprintln!("{what}: {:.0} %, {:.0} s", tenth * 10.0, begun.elapsed().as_secs_f64());
        }
    }
}

/// A section of a former report, its heading included.
fn section_of<'a>(report: &'a str, title: &str) -> Option<&'a str> {
    let start = report.find(&format!("\n## {title}\n"))?;
    let end = report[start + 1..].find("\n## ").map_or(report.len(), |end| start + 1 + end);
    Some(&report[start..end])
}

impl Part {
    fn title(self) -> &'static str {
        match self {
            Part::Detection => "A crash is known by all survivors",
            Part::Bandwidth => "Bytes that a node sends in a second",
            Part::Stalls => "A tenth of the mesh stalls",
            Part::Loss => "Healthy nodes evicted at 5 % loss",
            Part::Join => "Thousands join at once by one seed",
            Part::Mixed => "Mixed faults",
        }
    }
}

impl Arguments {
    fn section(&self, part: Part) -> anyhow::Result<String> {
        let mut section = format!("\n## {}\n\n", part.title());
        match part {
            Part::Detection => detection_table(&mut section, &self.sizes)?,
            Part::Bandwidth => bandwidth_table(&mut section, &self.sizes)?,
            Part::Stalls => stall_table(&mut section)?,
            Part::Loss => loss_lines(&mut section, self.probes)?,
            Part::Join => join_lines(&mut section, self.joiners)?,
            Part::Mixed => mixed_lines(&mut section, self.mixed)?,
        }
        Ok(section)
    }
}

fn detection_table(report: &mut String, sizes: &[usize]) -> anyhow::Result<()> {
    report.push_str(
        "Seconds from the crash until the last survivor holds the node for dead. Crashes follow each other in one world.\n\n\
         | nodes | goal p99 | ours p50 | p99 | slowest | foca p50 | p99 | crashes |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for &nodes in sizes {
        let (worlds, crashes) = match nodes {
            0..=200 => (20, 10),
            _ => (1, 100),
        };
        let (ours, theirs) =
            (format!("crashes of {nodes}, ours"), format!("crashes of {nodes}, foca"));
        let ours = all_detections(&Ours::default(), nodes, worlds, crashes, ours);
        // foca looks members up one by one: ten thousand of them take hours to set up.
        let foca = (nodes <= FOCA_NODES_MAX)
            .then(|| all_detections(&Foca, nodes, worlds, crashes, theirs));
        let goal = match nodes {
            0..=100 => "≤ 3",
            101..=1000 => "≤ 4.5",
            _ => "≤ 6",
        };
        let theirs = |share| foca.as_ref().map_or("-".to_owned(), |times| shown(times, share));
        writeln!(
            report,
            "| {nodes} | {goal} | {} | **{}** | {} | {} | {} | {} |",
            shown(&ours, 0.5),
            shown(&ours, 0.99),
            shown(&ours, 1.0),
            theirs(0.5),
            theirs(0.99),
            ours.len(),
        )?;
    }
    Ok(())
}

fn all_detections<S: System>(
    system: &S,
    nodes: usize,
    worlds: u64,
    crashes: usize,
    what: String,
) -> Times {
    let mut times = Times::default();
    let mut progress = progress(what);
    for seed in 0..worlds {
        let mut inner = |share| progress((seed as f64 + share) / worlds as f64);
        times.merge(&detection(system, seed, nodes, crashes, &mut inner));
    }
    times
}

fn shown(times: &Times, share: f64) -> String {
    times.quantile(share).map_or("not by all".to_owned(), |s| format!("{s:.2}"))
}

fn bandwidth_table(report: &mut String, sizes: &[usize]) -> anyhow::Result<()> {
    report.push_str(
        "Nothing happens. IPv4 and UDP headers (28 bytes a datagram) included. With QUIC: also its headers, tags and acknowledgements, counted \
         by a model of quinn (`tests/sim/src/quic.rs`); what real nodes send is in [membership.md](membership.md).\n\n\
         | nodes | loss | goal | ours with QUIC, mean | busiest node | ours without, mean | busiest node | datagrams | foca without, mean | busiest node |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for &nodes in sizes {
        for (loss, goal) in [(0.0, "≤ 500"), (0.05, "≤ 3,000")] {
            let seconds = if nodes > 2000 { 20 } else { 60 };
            eprintln!("bytes of {nodes} at {loss} loss");
            let ours = bandwidth(&Ours::default(), 1, nodes, loss, seconds);
            let foca = (nodes <= FOCA_NODES_MAX)
                .then(|| bandwidth(&Foca, 1, nodes, loss, seconds))
                .map_or("- | -".to_owned(), |foca| format!("{:.0} | {:.0}", foca.mean, foca.most));
            writeln!(
                report,
                "| {nodes} | {:.0} % | {goal} | **{:.0}** | {:.0} | {:.0} | {:.0} | {:.1} | {foca} |",
                loss * 100.0,
                ours.quic_mean,
                ours.quic_most,
                ours.mean,
                ours.most,
                ours.datagrams_per_s,
            )?;
        }
    }
    Ok(())
}

fn stall_table(report: &mut String) -> anyhow::Result<()> {
    report.push_str(
        "200 nodes; 20 of them stall again and again, with 1 to 10 s between, for 150 s. A stalled node runs nothing, then its timers and packets \
         at once. An eviction: a node declared dead by anyone, counted once for all that believe it. Healthy are the 180 that never stall. Those \
         that stall for longer than a crash takes to be known cannot be told from crashed ones; they must come back, and do. Means over the seeds.\n\n\
         | stall | seeds | goal | ours: healthy evicted | stalled evicted | suspicions of healthy | foca: healthy evicted | stalled evicted |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    const SEEDS: u64 = 5;
    for stall_s in [1.0, 3.0, 10.0] {
        let mut progress = progress(format!("stalls of {stall_s} s"));
        let mut all = |begun: f64, f: &dyn Fn(u64) -> Evictions| {
            let one = |seed: u64| {
                progress((begun + seed as f64 / SEEDS as f64) / 2.0);
                f(seed)
            };
            (0..SEEDS).map(one).collect::<Vec<_>>()
        };
        let ours = all(0.0, &|seed| stalls(&Ours::default(), seed, 200, stall_s));
        let foca = all(1.0, &|seed| stalls(&Foca, seed, 200, stall_s));
        let mean = |all: &[Evictions], f: fn(&Evictions) -> usize| {
            all.iter().map(f).sum::<usize>() as f64 / SEEDS as f64
        };
        writeln!(
            report,
            "| {stall_s} s | {SEEDS} | ≤ 2 | **{:.1}** | {:.1} | {:.1} | {:.1} | {:.1} |",
            mean(&ours, |e| e.healthy),
            mean(&ours, |e| e.stalled),
            mean(&ours, |e| e.suspicions_healthy as usize),
            mean(&foca, |e| e.healthy),
            mean(&foca, |e| e.stalled),
        )?;
    }
    Ok(())
}

fn loss_lines(report: &mut String, probes: u64) -> anyhow::Result<()> {
    let config = MembershipConfig::default();
    let Evictions { healthy, suspicions_healthy, probes, .. } =
        lossy(&config, 1, 500, 0.05, probes, &mut progress("probes at 5 % loss".to_owned()));
    writeln!(
        report,
        "500 nodes, {probes} probe rounds: **{healthy}** evicted (goal: 0 in 10^7). {suspicions_healthy} times a node held a healthy one for suspect.",
    )?;
    Ok(())
}

fn join_lines(report: &mut String, joiners: usize) -> anyhow::Result<()> {
    const FOCA_WITHIN_S: u64 = 15;
    let shown = |done: Option<f64>, within: u64| {
        done.map_or(format!("not within {within} s"), |s| format!("{s:.2} s"))
    };
    let progress = |who| progress(format!("{joiners} join, {who}"));
    let (ours, most) = join(&Ours::default(), 1, joiners, 60, &mut progress("ours"));
    let (foca, _) = join(&Foca, 1, joiners, FOCA_WITHIN_S, &mut progress("foca"));
    writeln!(
        report,
        "{joiners} nodes start at one moment and know one seed. Every view is complete after **{}** (goal: < 10 s); the busiest node has sent {:.1} MB by then. foca: {}.",
        shown(ours, 60),
        most as f64 / 1e6,
        shown(foca, FOCA_WITHIN_S),
    )?;
    Ok(())
}

fn mixed_lines(report: &mut String, seeds: u64) -> anyhow::Result<()> {
    let (mut failed, mut events) = (Vec::new(), 0);
    let mut progress = progress("mixed faults".to_owned());
    for seed in 0..seeds {
        progress(seed as f64 / seeds as f64);
        let scenario = Scenario::mixed(seed);
        let outcome = scenario.simulate(false);
        events += outcome.world.events;
        if let Err(why) = scenario.judge(&outcome) {
            failed.push(format!("\n- seed {seed}: {why:#}"));
        }
    }
    writeln!(
        report,
        "{seeds} seeds, {events} events: a minute of random faults (crashes, restarts with kept, old and wiped disks, stalls, partitions, one-way links, loss, \
         drifting clocks, noise, lying disks), then calm. No ghost may come back, all bounds must hold, and {CONVERGED_WITHIN_S} s after the last fault every view must be \
         complete and right, and stay so. **{} failed.**{}",
        failed.len(),
        failed.concat(),
    )?;
    Ok(())
}

/// Beyond that, foca is not measured.
const FOCA_NODES_MAX: usize = 2000;
const HEAD: &str = "# Membership, measured\n\n\
Made by `cargo run --release -p grapevine-sim --bin membership-report`; do not edit. The machine is the daemon's, the world is simulated \
([membership.md](membership.md)).\n\n\
Links: one-way delay 2 ms plus an exponential part of mean 8 ms (at most 82 ms), which reorders. Ours: the defaults. foca 2.0.0, \
tightened: probe period 400 ms, probe timeout 120 ms, 3 indirect probes, suspicion `0.4 s x log10(n)`, gossip to 3 each 100 ms, \
`4 x log10(n)` transmissions, announcements to the dead each 2 s, down members notified, identities that renew themselves. Its identities \
take 10 bytes on the wire, ours 32.\n";
