//! What can go wrong in the world, by plan or at random.

use protocol::membership::wire::{Body, Datagram, INCARNATION_MAX, Update, VERSION};
use protocol::random::Random;
use serde::{Deserialize, Serialize};

use crate::actor::{Actor, NodeIndex};
use crate::vine::{SimContact, SimId};
use crate::world::{SECOND, World};

/// One thing that happens to the world.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// Starts nodes that were not there yet, or had left.
    Join {
        nodes: Nodes,
    },
    Leave {
        nodes: Nodes,
    },
    Crash {
        nodes: Nodes,
    },
    /// Starts crashed nodes again.
    Restart {
        nodes: Nodes,
        disk: DiskFate,
    },
    Stall {
        nodes: Nodes,
        for_s: f64,
    },
    Partition {
        groups: Vec<Nodes>,
    },
    /// One way only.
    Block {
        from: Nodes,
        to: Nodes,
    },
    Nat {
        nodes: Nodes,
    },
    /// Of all links from now on.
    Loss {
        rate: f64,
    },
    Drift {
        nodes: Nodes,
        ppm: i64,
    },
    /// From now on the disks of these nodes pretend to sync.
    DiskLies {
        nodes: Nodes,
    },
    /// A member lies to every other one about a third.
    Forge {
        by: NodeIndex,
        about: NodeIndex,
        lie: Lie,
    },
    /// A member sends `count` datagrams of random bytes to every other one.
    Garbage {
        by: NodeIndex,
        count: u32,
    },
    /// Ends partitions, one-way links and loss.
    Heal,
}

/// Node numbers, as single ones and as ranges: `[3, "10..20"]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(try_from = "Vec<NodesItem>")]
pub struct Nodes(pub Vec<NodeIndex>);

#[derive(Deserialize)]
#[serde(untagged)]
enum NodesItem {
    One(NodeIndex),
    Range(String),
}

impl TryFrom<Vec<NodesItem>> for Nodes {
    type Error = String;

    fn try_from(items: Vec<NodesItem>) -> Result<Self, String> {
        let mut nodes = Vec::new();
        for item in items {
            match item {
                NodesItem::One(node) => nodes.push(node),
                NodesItem::Range(range) => {
                    let ends = range.split_once("..");
                    let number = |s: &str| s.parse::<NodeIndex>();
                    let ends = ends.map(|(first, end)| (number(first), number(end)));
                    let Some((Ok(first), Ok(end))) = ends else {
                        return Err(format!("{range:?} is no range of nodes such as \"10..20\""));
                    };
                    nodes.extend(first..end);
                }
            }
        }
        Ok(Nodes(nodes))
    }
}

/// What became of the disk while the node was down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFate {
    Kept,
    Wiped,
    /// An old backup was put back.
    Old,
}

/// What a member may claim of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Lie {
    Dead,
    Left,
    Suspect,
    /// It is alive with an incarnation far ahead.
    Jump,
    /// It is alive with the next incarnation, although it is gone.
    Ghost,
}

/// Makes it happen now.
pub fn apply<A: Actor>(world: &mut World<A>, fault: &Fault, seeds: &[NodeIndex]) {
    match fault {
        Fault::Join { nodes } => {
            nodes.0.iter().for_each(|node| world.start(*node, seeds.to_vec()));
        }
        Fault::Leave { nodes } => nodes.0.iter().for_each(|node| world.leave(*node)),
        Fault::Crash { nodes } => nodes.0.iter().for_each(|node| world.crash(*node)),
        Fault::Restart { nodes, disk } => {
            for node in &nodes.0 {
                let sim_disk = &mut world.nodes[*node as usize].disk;
                match disk {
                    DiskFate::Kept => {}
                    DiskFate::Wiped => sim_disk.wipe(),
                    DiskFate::Old => sim_disk.roll_back(),
                }
                world.start(*node, seeds.to_vec());
            }
        }
        Fault::Stall { nodes, for_s } => {
            let nanos = (for_s * SECOND as f64) as u64;
            nodes.0.iter().for_each(|node| world.stall(*node, nanos));
        }
        Fault::Partition { groups } => {
            let groups: Vec<_> = groups.iter().map(|g| g.0.clone()).collect();
            world.net.partition(&groups);
        }
        Fault::Block { from, to } => world.net.block(&from.0, &to.0),
        Fault::Nat { nodes } => {
            nodes.0.iter().for_each(|node| world.net.put_behind_nat(*node));
        }
        Fault::Loss { rate } => world.net.links.loss = *rate,
        Fault::Drift { nodes, ppm } => {
            nodes.0.iter().for_each(|node| world.set_drift(*node, *ppm));
        }
        Fault::DiskLies { nodes } => {
            nodes.0.iter().for_each(|node| world.nodes[*node as usize].disk.lies = true);
        }
        Fault::Forge { by, about, lie } => forge(world, *by, *about, *lie),
        Fault::Garbage { by, count } => throw_garbage(world, *by, *count),
        Fault::Heal => {
            world.net.heal();
            world.net.links.loss = 0.0;
        }
    }
}

fn forge<A: Actor>(world: &mut World<A>, by: NodeIndex, about: NodeIndex, lie: Lie) {
    let (id, incarnation) = (SimId(about), 0);
    let contact = SimContact(about);
    // The liar does not know the incarnation; it tries some.
    for guess in 0..4 {
        let update = match lie {
            Lie::Dead => Update::Dead { id, incarnation: guess },
            Lie::Left => Update::Left { id, incarnation: guess },
            Lie::Suspect => Update::Suspect { id, incarnation: guess, accusers: vec![SimId(by)] },
            Lie::Jump => {
                let incarnation = INCARNATION_MAX - guess;
                Update::Alive { id, incarnation, version: 0, contact }
            }
            Lie::Ghost => Update::Alive { id, incarnation: guess + 1, version: 0, contact },
        };
        let (flags, body) = (0, Body::<SimId>::Gossip);
        let datagram =
            Datagram { version: VERSION, flags, incarnation, body, updates: vec![update] };
        let bytes = datagram.encode();
        for to in 0..world.nodes.len() as NodeIndex {
            if to != by {
                world.inject(by, to, bytes.clone());
            }
        }
    }
}

/// Half of it pure noise, half of it starting as a datagram would.
fn throw_garbage<A: Actor>(world: &mut World<A>, by: NodeIndex, count: u32) {
    for to in 0..world.nodes.len() as NodeIndex {
        for _ in 0..count {
            let length = world.random.below(1400);
            let mut bytes: Vec<u8> = (0..length).map(|_| world.random.next_u64() as u8).collect();
            if world.random.below(2) == 0 && length > 4 {
                bytes[..4].copy_from_slice(&[VERSION, 0, 0, world.random.below(10) as u8]);
            }
            if to != by {
                world.inject(by, to, bytes);
            }
        }
    }
}

/// A random fault among those that a run of mixed faults has. Liars are not among them: with a liar
/// in the mesh, evictions can be forced for as long as it lies.
pub fn invent(random: &mut Random, nodes: NodeIndex) -> Fault {
    let one = |random: &mut Random| random.below(nodes as usize) as NodeIndex;
    let few = |random: &mut Random| {
        Nodes((0..1 + random.below(1 + nodes as usize / 4)).map(|_| one(random)).collect())
    };
    match random.below(16) {
        0 | 1 => Fault::Crash { nodes: few(random) },
        2..5 => {
            let disk =
                [DiskFate::Kept, DiskFate::Kept, DiskFate::Wiped, DiskFate::Old][random.below(4)];
            Fault::Restart { nodes: few(random), disk }
        }
        5 | 6 => Fault::Stall { nodes: few(random), for_s: random.unit() * random.unit() * 30.0 },
        7 | 8 => {
            let groups = (0..1 + random.below(2)).map(|_| few(random)).collect();
            Fault::Partition { groups }
        }
        9 => Fault::Block { from: few(random), to: few(random) },
        10 => Fault::Loss { rate: random.unit() * random.unit() * 0.5 },
        11 => Fault::Drift { nodes: few(random), ppm: random.below(200_000) as i64 - 100_000 },
        12 => Fault::Leave { nodes: Nodes(vec![one(random)]) },
        13 => Fault::Garbage { by: one(random), count: 3 },
        14 => Fault::DiskLies { nodes: few(random) },
        _ => Fault::Heal,
    }
}
