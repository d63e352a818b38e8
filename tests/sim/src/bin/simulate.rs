//! Runs scenario files and seeds of mixed faults, and replays one that failed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::{Parser, Subcommand};
use protocol::membership::MemberView;
use scheduler::router::Policy;
use sim::directory::{self, Rates, traffic};
use sim::routing::{Load, Result as Routed, Study, quantile};
use sim::scenario::{Outcome, Scenario};
use sim::transfer::{Counts, Fate, Plan, event_faults, with_faults};
use sim::vine::{SimContact, SimId};
use sim::world::SECOND;

/// Runs scenarios in virtual time. The same seed always gives the same run.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a scenario file.
    Scenario {
        file: PathBuf,
        /// Another seed than the file's.
        #[arg(long)]
        seed: Option<u64>,
        /// Prints what every node saw, line by line.
        #[arg(long)]
        trace: bool,
        /// Writes every input of every node, byte by byte.
        #[arg(long)]
        transcript: Option<PathBuf>,
    },
    /// Runs seeds of mixed faults; those that fail can be replayed with `replay SEED`.
    Mixed {
        #[arg(long, default_value_t = 0)]
        first: u64,
        #[arg(long, default_value_t = 100)]
        count: u64,
    },
    /// Runs one seed of mixed faults and prints its faults and what every node saw.
    Replay { seed: u64 },
    /// Prints a seed of mixed faults as a scenario file, to be kept.
    Export { seed: u64 },
    /// Hand-offs of KV blocks: seeds of mixed faults.
    Transfer {
        #[arg(long, default_value_t = 0)]
        first: u64,
        #[arg(long, default_value_t = 100)]
        count: u64,
    },
    /// Hand-offs of KV blocks: every fault at every event of one hand-off, and of one whose first sender
    /// has failed, for some seeds.
    TransferEvents {
        #[arg(long, default_value_t = 0)]
        first: u64,
        #[arg(long, default_value_t = 1)]
        count: u64,
    },
    /// Routing: chats of several tenants on four nodes, under each policy. Prints a table.
    Routing {
        #[arg(long, default_value_t = 0)]
        first: u64,
        #[arg(long, default_value_t = 10)]
        count: u64,
    },
    /// Hand-offs of KV blocks: one seed of mixed faults, its plan and what became of its requests.
    TransferReplay { seed: u64 },
    /// The directory of KV blocks: seeds of mixed faults, then what nodes send at some rates.
    Directory {
        #[arg(long, default_value_t = 0)]
        first: u64,
        #[arg(long, default_value_t = 100)]
        count: u64,
        /// Measures bytes in meshes of so many nodes; none are measured without it.
        #[arg(long, value_delimiter = ',')]
        nodes: Vec<usize>,
        /// Seconds measured.
        #[arg(long, default_value_t = 30)]
        seconds: u64,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Scenario { file, seed, trace, transcript } => {
            let text = std::fs::read_to_string(&file)
                .with_context(|| format!("cannot read {}", file.display()))?;
            let mut scenario = Scenario::parse(&text)?;
            scenario.seed = seed.unwrap_or(scenario.seed);
            let outcome = scenario.simulate(transcript.is_some());
            if trace {
                print_trace(&scenario, &outcome);
            }
            if let (Some(path), Some(bytes)) = (transcript, &outcome.world.transcript) {
                std::fs::write(&path, bytes)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
            print_sum(&outcome);
            scenario.judge(&outcome)
        }
        Command::Mixed { first, count } => {
            let (mut failed, mut events) = (0, 0);
            for seed in first..first + count {
                let scenario = Scenario::mixed(seed);
                let outcome = scenario.simulate(false);
                events += outcome.world.events;
                if let Err(why) = scenario.judge(&outcome) {
                    failed += 1;
                    println!("seed {seed}: {why:#}");
                }
            }
            println!("{count} seeds from {first}, {events} events, {failed} failed");
            match failed {
                0 => Ok(()),
                _ => bail!("{failed} seeds failed"),
            }
        }
        Command::Export { seed } => {
            print!("{}", Scenario::mixed(seed).to_text()?);
            Ok(())
        }
        Command::Transfer { first, count } => transfers(first, count),
        Command::TransferEvents { first, count } => transfer_events(first, count),
        Command::Routing { first, count } => {
            routing(first, count);
            Ok(())
        }
        Command::TransferReplay { seed } => {
            let plan = Plan::mixed(seed, None);
            let outcome = plan.run(false);
            for planned in &plan.actions {
                println!("{:9.3} ms  {:?}", planned.at_ms, planned.action);
            }
            outcome.fates.iter().for_each(|(request, fate)| println!("{request}: {fate:?}"));
            println!("{:#?}", outcome.counts);
            ensure!(outcome.broken.is_empty(), "{}", outcome.broken.join("\n"));
            Ok(())
        }
        Command::Directory { first, count, nodes, seconds } => {
            if count > 0 {
                directories(first, count)?;
            }
            for nodes in nodes {
                directory_traffic(nodes, seconds);
            }
            Ok(())
        }
        Command::Replay { seed } => {
            let scenario = Scenario::mixed(seed);
            let outcome = scenario.simulate(false);
            print_trace(&scenario, &outcome);
            print_sum(&outcome);
            scenario.judge(&outcome)
        }
    }
}

fn routing(first: u64, count: u64) {
    println!(
        "| load | policy | TTFT p50 | p95 | p99 | gap p95 | cached | fetched | busiest / mean | refused |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for load in Load::ALL {
        for policy in Policy::ALL {
            let mut sum = Routed::default();
            for seed in first..first + count {
                sum.add(Study { load, seed, policy }.run());
            }
            let ttft = |share| quantile(&sum.ttft_ms, share);
            println!(
                "| {} | {} | {:.0} ms | {:.0} | {:.0} | {:.0} ms | {:.1} % | {:.1} % | {:.2} | {} |",
                load.as_str(),
                policy.as_str(),
                ttft(0.5),
                ttft(0.95),
                ttft(0.99),
                quantile(&sum.gap_ms, 0.95),
                sum.hit_rate() * 100.0,
                sum.fetched() * 100.0,
                sum.spread(),
                sum.refused,
            );
            let decisions = &sum.decisions;
            if decisions.first_tokens > 0 {
                let each = |us: u64| us as f64 / 1e3 / decisions.first_tokens as f64;
                eprintln!(
                    "{}, {}: {} decisions {:?}, estimates off by {:.0} ms on average, regret {:.1} ms \
                     (exploring {:.1}) for each",
                    load.as_str(),
                    policy.as_str(),
                    decisions.first_tokens,
                    decisions.replicas,
                    each(decisions.error_us),
                    each(decisions.regret_us),
                    each(decisions.regret_explored_us),
                );
            }
        }
    }
}

fn transfers(first: u64, count: u64) -> anyhow::Result<()> {
    let (mut failed, mut events, mut sum) = (0, 0, Counts::default());
    let mut fates = BTreeMap::<&str, u64>::new();
    for seed in first..first + count {
        let outcome = Plan::mixed(seed, None).run(false);
        events += outcome.events;
        sum.add(&outcome.counts);
        for (_, fate) in &outcome.fates {
            *fates.entry(fate.map_or("waiting", Fate::word)).or_default() += 1;
        }
        if !outcome.broken.is_empty() {
            failed += 1;
            println!("seed {seed}: {}", outcome.broken.join("; "));
        }
    }
    println!("{sum:#?}\nrequests: {fates:?}");
    println!("{count} seeds from {first}, {events} events, {failed} failed");
    ensure!(failed == 0, "{failed} seeds failed");
    Ok(())
}

fn transfer_events(first: u64, count: u64) -> anyhow::Result<()> {
    let (mut runs, mut failed, mut events) = (0, 0, 0);
    for seed in first..first + count {
        for faults in event_faults(seed, true) {
            let outcome = with_faults(seed, &faults, false);
            (runs, events) = (runs + 1, events + outcome.events);
            if !outcome.broken.is_empty() {
                failed += 1;
                let broken = outcome.broken.join("; ");
                println!("seed {seed}, {faults:?}: {broken}");
            }
        }
    }
    println!("{runs} runs of {count} seeds from {first}, {events} events, {failed} failed");
    ensure!(failed == 0, "{failed} runs failed");
    Ok(())
}

fn directories(first: u64, count: u64) -> anyhow::Result<()> {
    let (mut failed, mut events, mut sum) = (0, 0, directory::Counts::default());
    for seed in first..first + count {
        let outcome = directory::Plan::mixed(seed, None).run(false);
        events += outcome.events;
        sum.add(&outcome.counts);
        if !outcome.broken.is_empty() {
            failed += 1;
            println!("seed {seed}: {}", outcome.broken.join("; "));
        }
    }
    println!("{sum:#?}");
    println!("{count} seeds from {first}, {events} events, {failed} failed");
    ensure!(failed == 0, "{failed} seeds failed");
    Ok(())
}

/// One line of a table for each rate of blocks, the last for nodes that compute as fast as a large GPU.
fn directory_traffic(nodes: usize, seconds: u64) {
    println!(
        "| nodes | owners | stored and removed /s | reporter sends B/s | owner sends B/s | owner receives B/s |"
    );
    for (prompts_per_s, blocks_per_prompt) in [(0.0, 1), (2.0, 30), (10.0, 50), (20.0, 60)] {
        for owners in [2, 8] {
            let rates = Rates { prompts_per_s, blocks_per_prompt, owners };
            let sum = traffic(1, nodes, rates, seconds);
            println!(
                "| {nodes} | {owners} | {:.0} | {:.0} | {:.0} | {:.0} |",
                sum.events_per_s, sum.reporter, sum.owner, sum.owner_receives
            );
        }
    }
}

fn print_trace(scenario: &Scenario, outcome: &Outcome) {
    println!("{}: {} nodes, seeds 0..{}", scenario.about, scenario.nodes, scenario.seeds);
    let mut faults = scenario.faults.iter().peekable();
    for seen in &outcome.seen {
        let at = seen.at as f64 / SECOND as f64;
        while let Some(planned) = faults.next_if(|planned| planned.at_s <= at) {
            println!("{:10.4} s  {:?}", planned.at_s, planned.fault);
        }
        println!("{at:10.4} s  {:4} {:?} {}", seen.observer, seen.sight, seen.subject);
    }
}

fn print_sum(outcome: &Outcome) {
    let Outcome { world, oracle, .. } = outcome;
    println!("{} events, {} s, {} nodes up", world.events, world.now / SECOND, world.up().count());
    for node in world.up() {
        let vine = world.nodes[node as usize].actor.as_ref().expect("it is up");
        let mut view: Vec<_> = vine.machine.members().collect();
        view.sort_by_key(|member| member.id);
        let line = |m: &MemberView<'_, SimId, SimContact>| {
            format!("{} {:?} {}", m.id.0, m.state, m.incarnation)
        };
        let view: Vec<_> = view.iter().map(line).collect();
        println!("{node} (incarnation {}): {}", vine.machine.incarnation(), view.join(", "));
        println!("    {:?}", vine.machine.stats());
    }
    println!("healthy nodes evicted: {:?}", oracle.healthy_evicted);
    println!("stalled or cut off nodes evicted: {:?}", oracle.others_evicted);
}
