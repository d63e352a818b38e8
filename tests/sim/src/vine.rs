//! Our membership as an actor, with identities that are small here and full-sized on the wire.

use bincode::de::Decoder;
use bincode::de::read::Reader;
use bincode::enc::Encoder;
use bincode::enc::write::Writer;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};
use protocol::membership::{
    Contact, Destination, Identity, Membership, MembershipConfig, MembershipEvent, MembershipInput,
    MembershipOutput,
};
use protocol::random::mix;
use protocol::{Instant, Machine};

use crate::actor::{Actor, Effect, NodeIndex, Sight, Stimulus};
use crate::world::Birth;

/// The number of a node, which takes the 32 bytes of a real identity on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SimId(pub NodeIndex);

impl Identity for SimId {
    fn digest(&self) -> u64 {
        mix(u64::from(self.0) + 1)
    }
}

impl Encode for SimId {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        encoder.writer().write(&self.0.to_le_bytes())?;
        encoder.writer().write(&[0; 28])
    }
}

impl<Context> Decode<Context> for SimId {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        decoder.claim_bytes_read(32)?;
        let (mut number, mut rest) = ([0; 4], [0; 28]);
        decoder.reader().read(&mut number)?;
        decoder.reader().read(&mut rest)?;
        Ok(SimId(u32::from_le_bytes(number)))
    }
}

/// The number of a node, which takes the 9 bytes of one IPv4 address on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimContact(pub NodeIndex);

impl Contact for SimContact {
    fn is_valid(&self) -> bool {
        true
    }
}

impl Encode for SimContact {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        encoder.writer().write(&self.0.to_le_bytes())?;
        encoder.writer().write(&[0; 5])
    }
}

impl<Context> Decode<Context> for SimContact {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        decoder.claim_bytes_read(9)?;
        let (mut number, mut rest) = ([0; 4], [0; 5]);
        decoder.reader().read(&mut number)?;
        decoder.reader().read(&mut rest)?;
        Ok(SimContact(u32::from_le_bytes(number)))
    }
}

/// A node that runs our membership.
pub struct Vine {
    pub machine: Membership<SimId, SimContact>,
    outputs: Vec<MembershipOutput<SimId, SimContact>>,
    /// Identities above it were invented; nothing can be sent to them.
    nodes: NodeIndex,
    news_max: usize,
}

impl Vine {
    pub fn new(config: MembershipConfig, nodes: usize, birth: Birth) -> Self {
        let incarnation = birth.persisted.map_or(0, |last| last + 1);
        let (id, contact) = (SimId(birth.node), SimContact(birth.node));
        let news_max = config.news_max;
        let machine = Membership::new(config, id, contact, incarnation, 0, birth.seed)
            .expect("scenarios have sound configurations");
        Vine { machine, outputs: Vec::new(), nodes: nodes as NodeIndex, news_max }
    }

    /// What [`World::new`](crate::world::World::new) needs to make such nodes.
    pub fn maker(config: MembershipConfig, nodes: usize) -> impl FnMut(Birth) -> Vine + 'static {
        move |birth| Vine::new(config.clone(), nodes, birth)
    }

    /// Lets it hold these nodes for present, as if it had been among them for long.
    pub fn knows(&mut self, now: Instant, nodes: &[NodeIndex]) {
        self.machine.preset(now, nodes.iter().map(|n| (SimId(*n), SimContact(*n))));
    }

    fn do_output(&self, output: MembershipOutput<SimId, SimContact>) -> Option<Effect> {
        Some(match output {
            MembershipOutput::Send { to, bytes } => {
                let (Destination::Node(SimId(to)) | Destination::Seed(SimContact(to))) = to;
                if to >= self.nodes {
                    return None;
                }
                Effect::Send { to, bytes }
            }
            MembershipOutput::Persist { incarnation } => Effect::Persist { incarnation },
            MembershipOutput::Gone => Effect::Gone,
            MembershipOutput::Event(event) => {
                let (sight, SimId(subject)) = match event {
                    MembershipEvent::Joined { id, .. } => (Sight::Joined, id),
                    MembershipEvent::Suspected { id, .. } => (Sight::Suspected, id),
                    MembershipEvent::Refuted { id, .. } => (Sight::Refuted, id),
                    MembershipEvent::Died { id, .. } => (Sight::Died, id),
                    MembershipEvent::Left { id, .. } => (Sight::Left, id),
                    MembershipEvent::Returned { id, .. } => (Sight::Returned, id),
                    MembershipEvent::Forgotten { id } => (Sight::Forgotten, id),
                    MembershipEvent::Changed { .. }
                    | MembershipEvent::SelfRefuted { .. }
                    | MembershipEvent::Stalled { .. } => return None,
                };
                if subject >= self.nodes {
                    return None;
                }
                Effect::See { sight, subject }
            }
        })
    }
}

impl Actor for Vine {
    fn handle(&mut self, now: Instant, stimulus: Stimulus, effects: &mut Vec<Effect>) {
        let input = match stimulus {
            Stimulus::Start { seeds } => {
                MembershipInput::Start { seeds: seeds.into_iter().map(SimContact).collect() }
            }
            Stimulus::Datagram { from, bytes } => {
                MembershipInput::Datagram { from: SimId(from), bytes }
            }
            Stimulus::Timer => MembershipInput::Timer,
            Stimulus::Leave => MembershipInput::Leave,
        };
        let mut outputs = std::mem::take(&mut self.outputs);
        self.machine.handle(now, input, &mut outputs);
        effects.extend(outputs.drain(..).filter_map(|output| self.do_output(output)));
        self.outputs = outputs;
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.machine.next_deadline()
    }

    fn present(&self) -> Vec<NodeIndex> {
        let present = self.machine.members().filter(|m| m.state.is_present());
        let mut present: Vec<_> = present.map(|m| m.id.0).collect();
        present.sort_unstable();
        present
    }

    fn view_hash(&self) -> u64 {
        self.machine.view_hash()
    }

    fn broken_bound(&self) -> Option<String> {
        let stats = self.machine.stats();
        for (name, value, max) in [
            ("news", stats.news, self.news_max),
            ("probes", stats.probes_in_flight, 32),
            ("relays", stats.relays_in_flight, 64),
            ("verifications", stats.verifications_waiting, 8192),
            ("suspects", stats.suspects, stats.present),
        ] {
            if value > max {
                return Some(format!("{value} {name}, at most {max} are allowed"));
            }
        }
        None
    }
}
