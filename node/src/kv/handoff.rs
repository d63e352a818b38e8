//! A prompt's blocks from elsewhere, before its sequence is submitted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cache::transfer::{HandOff, Prompt, Source};
use engine::replica::GenerateRequest;
use protocol::RequestId;
use protocol::node_record::NodeRole;
use protocol::transfer::KvFirstToken;
use tokio::sync::{mpsc, oneshot};

use super::ModelKv;
use super::pool::PoolCommand;
use super::transfers::Input;
use crate::replica::ReplicaHandle;

/// Blocks that were brought for a request. Drop it when the request's sequence is submitted: until then
/// they cannot be evicted.
#[must_use]
pub(crate) struct Brought {
    replica: ReplicaHandle,
    request: RequestId,
}

impl Drop for Brought {
    fn drop(&mut self) {
        self.replica.pool(PoolCommand::End { request: self.request });
    }
}

/// A hand-off that is waited for; it is cancelled when nobody waits any more.
struct Waiting {
    inputs: mpsc::Sender<Input>,
    request: RequestId,
    over: bool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let (inputs, request) = (self.inputs.clone(), self.request);
        // Nothing is left to cancel once the runtime is gone.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { inputs.send(Input::Cancel { request }).await });
        }
    }
}

impl ModelKv {
    /// Gets what of a request's prompt is better had from peers than computed here. `None`: nothing. The
    /// request goes on in either case.
    pub async fn bring(
        self: &Arc<Self>,
        request: &GenerateRequest,
        deadline: Instant,
    ) -> Option<Brought> {
        let running = self.running.get()?;
        let mut tokens = request.prompt.clone();
        if let [before] = &request.resume[..] {
            tokens.extend(before.tokens.iter().map(|sampled| sampled.token));
        }
        // The last token is computed here in any case: its logits are wanted.
        let full = tokens.len().saturating_sub(1) / self.namer.block_tokens();
        let sources = self.sources();
        if full == 0 || sources.is_empty() {
            return None;
        }
        let mut names = self.namer.names(&request.tenant, &tokens);
        names.truncate(full);
        let (reply, known) = oneshot::channel();
        self.replica.pool(PoolCommand::Look { names: names.clone(), reply });
        let known = known.await.ok()?;
        if known >= full {
            return None;
        }
        let (ended, outcome) = oneshot::channel();
        let id = request.request;
        let deadline = deadline.min(Instant::now() + HAND_OFF_MAX);
        let handoff = HandOff {
            request: id,
            first: u32::try_from(known).ok()?,
            missing: names.split_off(known),
            prompt: Prompt {
                tenant: request.tenant.clone(),
                tokens,
                priority: request.priority,
                first_token: KvFirstToken::Receiver,
            },
            sources,
            // In the machine's time, once it has it.
            deadline: protocol::Instant::ORIGIN,
        };
        let mut waiting = Waiting { inputs: running.inputs.clone(), request: id, over: false };
        running.inputs.send(Input::HandOff { handoff, deadline, ended }).await.ok()?;
        let brought = Brought { replica: self.replica.clone(), request: id };
        let outcome = outcome.await;
        waiting.over = true;
        let ended = outcome.ok()?;
        tracing::debug!(request = %id, ?ended, "blocks from elsewhere");
        Some(brought)
    }

    /// Whom to ask, the best first.
    fn sources(&self) -> Vec<Source> {
        let Some(running) = self.running.get() else { return Vec::new() };
        let peers = running.roster.replicas_elsewhere(&self.model, &self.fingerprint);
        let prefill = peers.iter().filter(|peer| peer.role == NodeRole::Prefill && !peer.avoid);
        prefill.map(|peer| Source { peer: peer.node, prefill: true }).take(SOURCES_TRIED).collect()
    }
}

/// Longest wait for blocks from elsewhere.
const HAND_OFF_MAX: Duration = Duration::from_secs(60);
const SOURCES_TRIED: usize = 3;
