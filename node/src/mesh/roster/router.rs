//! What the router is asked and told about requests, blocks and paths.

use protocol::transfer::KV_STREAMS_MAX;
use protocol::{Duration, Instant, NodeId, RequestId};
use scheduler::router::{Ask, Choice, End, NoReplica, Outcome, PrefillAsk, PrefillPlan, Router};

use super::{Roster, loads};
use crate::mesh::quic::STREAM_WINDOW_BYTES;

impl Roster {
    /// The replica to ask; see [`Router::choose`].
    pub(crate) fn choose(&self, ask: &Ask<'_>) -> Result<Choice, NoReplica> {
        let Some(started) = self.started.get() else { return Err(NoReplica::UnknownModel) };
        let own = loads(&self.own_record(started));
        let now = self.now();
        let suspected = started.members.suspected();
        let mut router = self.router();
        router.report(now, started.mesh.node(), own);
        router.choose(now, &Ask { suspected: &suspected, ..*ask })
    }

    pub(crate) fn settle(&self, node: NodeId, request: RequestId, outcome: Outcome) {
        self.router().settle(self.now(), node, request, outcome);
    }

    /// This node's own answer to a request is made, if it made one.
    pub(crate) fn settle_here(&self, request: RequestId) {
        if let Some(mesh) = self.mesh() {
            self.settle(mesh.node(), request, Outcome::Ended);
        }
    }

    /// The first token of an answer leaves for its client.
    pub(crate) fn first_token(&self, request: RequestId) {
        self.router().decisions_mut().first_token(self.now(), request);
    }

    /// Where the keys and values of a prompt come from that is about to run on this node's replica, and
    /// has not been handed to it; see [`Router::plan_prefill`]. `None` before the start, and if there is
    /// no such replica.
    pub fn plan_prefill(&self, ask: &PrefillAsk<'_>) -> Option<PrefillPlan> {
        let started = self.started.get()?;
        let own = loads(&self.own_record(started));
        let now = self.now();
        let suspected = started.members.suspected();
        let mut router = self.router();
        router.report(now, started.mesh.node(), own);
        router.plan_prefill(now, &PrefillAsk { suspected: &suspected, ..*ask })
    }

    /// The keys and values of a planned prompt are there, `Failed` if this node had to compute what
    /// others were to bring.
    pub fn prefill_ended(&self, request: RequestId, end: End) {
        if self.state.get().is_some() {
            self.router().decisions_mut().prefill_ended(self.now(), request, end);
        }
    }

    /// So many bytes of blocks came from a node within `took`, in which nothing but the path was waited
    /// for; see [`LinkFigures::carried`](scheduler::router::LinkFigures::carried).
    pub fn carried(&self, node: NodeId, bytes: u64, took: Duration) {
        if self.state.get().is_some() {
            self.router().carried(node, bytes, took);
        }
    }

    /// Data streams that fill the path from a node, as far as their windows go: as many as its round trip
    /// and its measured goodput are worth, 1 to `KV_STREAMS_MAX`.
    pub fn data_streams(&self, node: NodeId) -> u8 {
        if self.state.get().is_none() {
            return 1;
        }
        let windows = self.router().link(node).windows(u64::from(STREAM_WINDOW_BYTES));
        windows.min(KV_STREAMS_MAX as u64) as u8
    }

    /// The router, to be looked at; `None` before the start.
    pub(in crate::mesh) fn with_router<T>(
        &self,
        look: impl FnOnce(Instant, &Router) -> T,
    ) -> Option<T> {
        self.state.get()?;
        Some(look(self.now(), &self.router()))
    }
}
