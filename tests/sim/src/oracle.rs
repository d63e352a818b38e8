//! What must hold in every world, whatever its faults.

use std::collections::{BTreeMap, BTreeSet};

use crate::actor::{Actor, NodeIndex, Sight};
use crate::world::{SECOND, Seen, World};

/// Judges what nodes see. Keeps one entry for each pair that ever parted.
#[derive(Debug, Default)]
pub struct Oracle {
    /// Pairs (observer, subject) where the observer holds the subject for departed.
    departed: BTreeSet<(NodeIndex, NodeIndex)>,
    /// Nodes that were running, reachable and not stalled when someone declared them dead: how often.
    pub healthy_evicted: BTreeMap<NodeIndex, u32>,
    /// Nodes that were declared dead while they stalled, or cut off from the observer.
    pub others_evicted: BTreeMap<NodeIndex, u32>,
    /// Suspicions of running, reachable nodes that did not stall, counted by observers.
    pub false_suspicions: u64,
    pub broken: Vec<String>,
}

impl Oracle {
    pub fn judge(&mut self, seen: &[Seen]) {
        for seen in seen {
            self.judge_one(seen);
        }
    }

    fn judge_one(&mut self, seen: &Seen) {
        let pair = (seen.observer, seen.subject);
        match seen.sight {
            Sight::Died | Sight::Left => {
                self.departed.insert(pair);
                if seen.sight == Sight::Died && seen.down_since.is_none() {
                    let healthy = seen.reachable && !seen.stalls;
                    let evicted =
                        if healthy { &mut self.healthy_evicted } else { &mut self.others_evicted };
                    *evicted.entry(seen.subject).or_default() += 1;
                }
            }
            Sight::Joined | Sight::Returned => {
                if self.departed.remove(&pair) && is_ghost(seen) {
                    let Seen { at, observer, subject, .. } = *seen;
                    let at = at as f64 / SECOND as f64;
                    self.broken.push(format!("at {at} s, ghost {subject} came back to {observer}"));
                }
            }
            Sight::Suspected => {
                let healthy = seen.down_since.is_none() && seen.reachable && !seen.stalls;
                self.false_suspicions += u64::from(healthy);
            }
            // A new life of the observer, which remembers nobody.
            Sight::Started => {
                self.departed.retain(|(observer, _)| *observer != seen.observer);
            }
            Sight::Refuted => {}
            Sight::Forgotten => {
                self.departed.remove(&pair);
            }
        }
    }
}

/// The subject was gone for longer than any datagram of its own can have been under way.
fn is_ghost(seen: &Seen) -> bool {
    let under_way = seen.down_since.map(|at| at.max(seen.observer_resumed_at) + SECOND);
    under_way.is_some_and(|latest| seen.at > latest)
}

/// Whether every running node holds exactly the running ones for present, and, in a network without
/// faults, at the same incarnations. The first that does not, otherwise.
pub fn converged<A: Actor>(world: &World<A>) -> Result<(), String> {
    let up: Vec<_> = world.up().collect();
    let mut hashes = BTreeMap::new();
    for &node in &up {
        let actor = world.nodes[node as usize].actor.as_ref().expect("it is up");
        hashes.entry(actor.view_hash()).or_insert(node);
        let present = actor.present();
        let missing = up.iter().find(|n| **n != node && present.binary_search(n).is_err());
        if let Some(missing) = missing {
            return Err(format!("{node} does not see {missing}"));
        }
        if let Some(extra) = present.iter().find(|n| up.binary_search(n).is_err()) {
            return Err(format!("{node} still sees {extra}"));
        }
    }
    match hashes.len() {
        0 | 1 => Ok(()),
        // A refutation may be under way.
        _ if world.net.is_disturbed() => Ok(()),
        _ => Err(format!("views of one membership differ: {:?}", hashes.values())),
    }
}

/// The first bound of a node that does not hold.
pub fn bounds_hold<A: Actor>(world: &World<A>) -> Result<(), String> {
    for node in world.up() {
        let actor = world.nodes[node as usize].actor.as_ref().expect("it is up");
        if let Some(why) = actor.broken_bound() {
            return Err(format!("node {node}: {why}"));
        }
    }
    Ok(())
}
