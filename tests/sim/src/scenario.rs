//! Scenarios: a world, what happens to it, and what must come of it; from a file or from a seed.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use protocol::membership::MembershipConfig;
use protocol::random::Random;
use serde::{Deserialize, Serialize};

use crate::actor::{NodeIndex, Sight};
use crate::fault::{DiskFate, Fault, Nodes, apply, invent};
use crate::net::Links;
use crate::oracle::{Oracle, bounds_hold, converged};
use crate::vine::Vine;
use crate::world::{SECOND, Seen, World};

/// A scenario file (TOML).
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, in one sentence.
    pub about: String,
    pub nodes: usize,
    /// Nodes `0..seeds` are known to everyone from the start.
    #[serde(default = "one")]
    pub seeds: NodeIndex,
    /// Nodes that run from the beginning; all, if not named.
    pub start: Option<Nodes>,
    /// The nodes that run from the beginning know each other already.
    #[serde(default = "yes")]
    pub acquainted: bool,
    #[serde(default)]
    pub seed: u64,
    #[serde(default)]
    pub links: Links,
    #[serde(default, rename = "fault")]
    pub faults: Vec<Planned>,
    pub end_s: f64,
    #[serde(default)]
    pub expect: Expect,
}

/// A fault and its time.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Planned {
    pub at_s: f64,
    #[serde(flatten)]
    pub fault: Fault,
}

/// What must come of a scenario, beside what must always hold.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// Running nodes hold exactly the running ones for present: from then on, until the end.
    pub converged_from_s: Option<f64>,
    /// These are dead in the view of every running node at that time.
    pub dead_by_s: BTreeMap<String, f64>,
    /// Running, reachable, unstalled nodes that someone declared dead.
    pub healthy_evicted_max: u32,
    /// Nodes declared dead while they stalled or were cut off.
    pub others_evicted_max: Option<u32>,
    pub others_evicted_min: u32,
}

/// What a run has left behind.
pub struct Outcome {
    pub world: World<Vine>,
    pub oracle: Oracle,
    pub seen: Vec<Seen>,
}

impl Scenario {
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let scenario: Scenario = toml::from_str(text)?;
        let known = |nodes: &Nodes| nodes.0.iter().all(|n| (*n as usize) < scenario.nodes);
        ensure!(scenario.start.iter().all(known), "start names nodes that do not exist");
        Ok(scenario)
    }

    /// The scenario as a file, every fault spelled out: a seed of mixed faults stays what it was when
    /// the faults that seeds invent change.
    pub fn to_text(&self) -> anyhow::Result<String> {
        toml::to_string(self).context("cannot be written as TOML")
    }

    /// Runs it with our membership and judges it.
    ///
    /// # Errors
    /// If an oracle is broken or an expectation is not met; the message says which.
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let outcome = self.simulate(false);
        self.judge(&outcome)?;
        Ok(outcome)
    }

    /// Runs it with our membership. Ends early when something that must always hold does not.
    pub fn simulate(&self, keep_transcript: bool) -> Outcome {
        let maker = Vine::maker(MembershipConfig::default(), self.nodes);
        let mut world = World::new(self.seed, self.nodes, self.links.clone(), maker);
        world.transcript = keep_transcript.then(Vec::new);
        let seeds: Vec<_> = (0..self.seeds).collect();
        let all = Nodes((0..self.nodes as NodeIndex).collect());
        let started = &self.start.as_ref().unwrap_or(&all).0;
        for &node in started {
            world.start_with(node, seeds.clone(), |vine, now| {
                if self.acquainted {
                    vine.knows(now, started);
                }
            });
        }
        for (number, planned) in (0..).zip(&self.faults) {
            world.plan_fault(nanos(planned.at_s), number);
        }
        let mut run = Outcome { world, oracle: Oracle::default(), seen: Vec::new() };
        let mut at = 0.0;
        while at < self.end_s && run.oracle.broken.is_empty() {
            at = (at + 0.5).min(self.end_s);
            self.advance(&mut run, nanos(at), &seeds);
            let mut holds = bounds_hold(&run.world);
            if self.expect.converged_from_s.is_some_and(|from| at >= from) {
                holds = holds.and_then(|()| converged(&run.world));
            }
            run.oracle.broken.extend(holds.err().map(|why| format!("at {at} s: {why}")));
        }
        run
    }

    fn advance(&self, run: &mut Outcome, until: u64, seeds: &[NodeIndex]) {
        loop {
            let due = run.world.run_until(until);
            run.oracle.judge(&run.world.seen);
            run.seen.append(&mut run.world.seen);
            let Some(number) = due else { break };
            apply(&mut run.world, &self.faults[number as usize].fault, seeds);
        }
    }

    /// Checks what it expects.
    ///
    /// # Errors
    /// If an oracle is broken or an expectation is not met; the message says which.
    pub fn judge(&self, run: &Outcome) -> anyhow::Result<()> {
        let Outcome { world, oracle, seen } = run;
        ensure!(oracle.broken.is_empty(), "{}", oracle.broken.join("; "));
        let healthy: u32 = oracle.healthy_evicted.values().sum();
        let max = self.expect.healthy_evicted_max;
        ensure!(healthy <= max, "healthy nodes were evicted: {:?}", oracle.healthy_evicted);
        let others = oracle.others_evicted.len() as u32;
        let (min, max) = (self.expect.others_evicted_min, self.expect.others_evicted_max);
        ensure!(others >= min, "only {others} others were evicted");
        ensure!(max.is_none_or(|max| others <= max), "evicted: {:?}", oracle.others_evicted);
        for (node, by_s) in &self.expect.dead_by_s {
            let node: NodeIndex = node.parse().context("dead_by_s names nodes by number")?;
            for observer in world.up().filter(|observer| *observer != node) {
                let dead = |s: &&Seen| {
                    (s.observer, s.subject) == (observer, node)
                        && matches!(s.sight, Sight::Died | Sight::Left)
                };
                let at = seen.iter().find(dead).map(|s| s.at);
                ensure!(
                    at.is_some_and(|at| at <= nanos(*by_s)),
                    "{observer} knew {node} to be gone at {at:?} ns, not by {by_s} s"
                );
            }
        }
        Ok(())
    }

    /// A random world with random faults for a minute, then healed: nodes come back, links are sound,
    /// and views must converge within [`CONVERGED_WITHIN_S`].
    pub fn mixed(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x6d69_7865_6400);
        let nodes_max = 2 + random.below(40);
        let nodes = 2 + random.below(nodes_max);
        let heal_s = 60.0;
        let mut faults = Vec::new();
        for _ in 0..3 + random.below(20) {
            let fault = invent(&mut random, nodes as NodeIndex);
            faults.push(Planned { at_s: 2.0 + random.unit() * (heal_s - 2.0), fault });
        }
        faults.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
        faults.push(Planned { at_s: heal_s, fault: Fault::Heal });
        let nodes_all = Nodes((0..nodes as NodeIndex).collect());
        let restart = Fault::Restart { nodes: nodes_all, disk: DiskFate::Kept };
        faults.push(Planned { at_s: heal_s, fault: restart });
        // The longest stall may reach beyond the heal.
        let calm_s = heal_s + STALL_S_MAX;
        Scenario {
            about: format!("mixed faults of seed {seed}"),
            nodes,
            seeds: 1 + random.below(nodes.min(3)) as NodeIndex,
            start: None,
            acquainted: random.below(2) == 0,
            seed,
            links: Links {
                latency_ms: 0.1 + random.unit() * 20.0,
                jitter_ms: random.unit() * 15.0,
                loss: 0.0,
                duplicate: random.unit() * 0.1,
            },
            faults,
            end_s: calm_s + CONVERGED_WITHIN_S + 5.0,
            expect: Expect {
                converged_from_s: Some(calm_s + CONVERGED_WITHIN_S),
                healthy_evicted_max: u32::MAX,
                ..Expect::default()
            },
        }
    }
}

fn nanos(seconds: f64) -> u64 {
    (seconds * SECOND as f64) as u64
}

fn one() -> NodeIndex {
    1
}

fn yes() -> bool {
    true
}

/// After the last fault of a mixed run, views are equal and right within this time.
pub const CONVERGED_WITHIN_S: f64 = 30.0;
const STALL_S_MAX: f64 = 30.0;
