//! KV blocks from node to node: the shell of [`cache::transfer`].
//!
//! ```text
//!   HTTP handler ── bring ──► Transfers (a task for each model: both machines) ◄── streams (tasks)
//!                                 │ commands          ▲ answers
//!                                 ▼                   │
//!                             replica's thread: pool and pages, between its steps
//! ```
//!
//! A block is copied once on each side: from its page to what the socket sends, and from what the socket received to its
//! page.

mod counters;
mod directory;
mod handoff;
mod pool;
mod streams;
mod stripes;
mod transfers;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cache::Namer;
use cache::transfer::TransferConfig;
use protocol::NodeId;
use protocol::frame::{Frame, Kind};
use protocol::transfer::{KvAsk, KvFormat, KvPart, KvRefusal, KvStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub(crate) use handoff::{Brought, Overlaps};
pub(crate) use pool::{PoolCommand, PoolEvent, PoolQueue, execute, served};

use crate::mesh::{CODE_FAILED, Call, DataStream, FrameStream, Roster};
use crate::metrics::Sample;
use crate::replica::ReplicaHandle;
use counters::Counters;
use directory::{Directory, pool_part};
use transfers::{Input, Transfers};

/// The transfers of every model of a node.
pub(crate) struct KvPlane {
    counters: Arc<Counters>,
    /// Whether this node prefills for others.
    prefills: bool,
    stop: CancellationToken,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Once the node is in a mesh.
    roster: Option<Arc<Roster>>,
    directory: Option<Arc<Directory>>,
    models: Vec<Arc<ModelKv>>,
}

/// The transfers of one model.
pub(crate) struct ModelKv {
    /// The model's name, and what its weights and numerics are called.
    model: String,
    fingerprint: String,
    namer: Namer,
    format: KvFormat,
    replica: ReplicaHandle,
    running: OnceLock<Running>,
}

struct Running {
    roster: Arc<Roster>,
    directory: Arc<Directory>,
    inputs: mpsc::Sender<Input>,
}

impl KvPlane {
    pub fn new(prefills: bool, stop: CancellationToken) -> Arc<KvPlane> {
        Arc::new(KvPlane { counters: Arc::default(), prefills, stop, state: Mutex::default() })
    }

    /// The node is in a mesh now.
    pub fn join(&self, roster: &Arc<Roster>) {
        let Some(directory) = Directory::start(roster, self.stop.clone()) else { return };
        let mut state = self.lock();
        (state.roster, state.directory) = (Some(roster.clone()), Some(directory.clone()));
        for (index, model) in state.models.iter().enumerate() {
            self.start(index, model, (roster, &directory));
        }
    }

    /// A model that can serve; `None` if it exchanges no blocks.
    pub fn add(
        &self,
        (model, fingerprint): (&str, &str),
        replica: ReplicaHandle,
        namer: Option<Namer>,
    ) -> Option<Arc<ModelKv>> {
        let (format, namer) = (replica.kv_format()?, namer?);
        let model = Arc::new(ModelKv {
            model: model.to_owned(),
            fingerprint: fingerprint.to_owned(),
            namer,
            format,
            replica,
            running: OnceLock::new(),
        });
        let mut state = self.lock();
        let index = state.models.len();
        state.models.push(model.clone());
        if let (Some(roster), Some(directory)) = (&state.roster, &state.directory) {
            self.start(index, &model, (roster, directory));
        }
        Some(model)
    }

    fn start(
        &self,
        index: usize,
        model: &ModelKv,
        (roster, directory): (&Arc<Roster>, &Arc<Directory>),
    ) {
        let stats = model.replica.stats();
        let capacity = stats.blocks_free + stats.blocks_cached + stats.blocks_used;
        let config = TransferConfig {
            prefills: self.prefills,
            ..TransferConfig::new(model.format, capacity)
        };
        let (inputs, inbox) = mpsc::channel(INPUTS_MAX);
        directory.serve(model.format.identity);
        if stats.tiers.is_some() {
            directory.serve(pool_part(model.format.identity));
        }
        let running = Running {
            roster: roster.clone(),
            directory: directory.clone(),
            inputs: inputs.clone(),
        };
        if model.running.set(running).is_err() {
            return;
        }
        let first_attempt = (index as u64) << ATTEMPT_BITS;
        let told = (self.counters.clone(), directory.clone(), inputs);
        let (replica, roster) = (model.replica.clone(), roster.clone());
        let transfers = Transfers::new(config, first_attempt, replica, roster, told);
        tokio::spawn(transfers.run(inbox, self.stop.clone()));
    }

    /// This node is shutting down: nothing new is begun for others.
    pub async fn leave(&self) {
        let models = self.lock().models.clone();
        for model in models {
            model.tell(Input::Leave).await;
        }
    }

    /// A member asks for blocks.
    pub async fn asked(&self, peer: NodeId, ask: Frame, mut stream: FrameStream) {
        let identity = KvAsk::from_frame(&ask).map(|ask| ask.format.identity);
        let models = self.lock().models.clone();
        let of_identity = identity
            .ok()
            .map(|identity| models.iter().find(|model| model.format.identity == identity).cloned());
        let refusal = match of_identity {
            Some(Some(model)) if model.running.get().is_some() => {
                return model.tell(Input::Asked { peer, ask, stream }).await;
            }
            Some(_) => KvRefusal::OtherModel,
            None => KvRefusal::Protocol,
        };
        // It may be gone; it does not wait for more.
        let frame = Frame::new(Kind::KV_REFUSAL, &refusal);
        let _ = stream.writer.send(&frame, stream.stream_timeout).await;
        stream.writer.finish();
        stream.writer.drained(stream.stream_timeout).await;
    }

    /// A member sends blocks. A stream that belongs to nothing is stopped.
    pub async fn data(&self, peer: NodeId, header: Frame, mut data: DataStream) {
        let stream = KvStream::from_frame(&header).ok();
        let part = KvPart::from_frame(&header).ok();
        let attempt = stream.map(|stream| stream.attempt).or(part.map(|part| part.attempt));
        let model = attempt.and_then(|attempt| {
            let index = usize::try_from(attempt >> ATTEMPT_BITS).ok()?;
            self.lock().models.get(index).cloned()
        });
        match (model, stream, part) {
            (Some(model), Some(header), _) => {
                model.tell(Input::DataOpened { peer, header, data }).await;
            }
            (Some(model), None, Some(part)) => {
                model.tell(Input::PartOpened { peer, part, data }).await;
            }
            _ => data.reader.stop(),
        }
    }

    /// A member says or asks something about the directory.
    pub async fn directory_call(&self, call: Call) {
        let directory = self.lock().directory.clone();
        match directory {
            Some(directory) => directory.answer(call).await,
            // It asks again.
            None => drop(call.stream.refuse(CODE_FAILED, "this node is starting").await),
        }
    }

    pub fn samples(&self) -> Vec<Sample> {
        let directory = self.lock().directory.clone();
        let mut samples = self.counters.samples();
        samples.extend(directory.iter().flat_map(|directory| directory.samples()));
        samples
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ModelKv {
    async fn tell(&self, input: Input) {
        if let Some(running) = self.running.get() {
            // Closed only when the node stops, or the replica has ended.
            let _ = running.inputs.send(input).await;
        }
    }
}

/// Inputs that wait for a model's task; who has more waits. Too small: streams stutter. Too large:
/// payloads that wait for the replica take memory.
const INPUTS_MAX: usize = 256;
/// Attempts of one model, before the numbers of the next begin.
const ATTEMPT_BITS: u32 = 48;
