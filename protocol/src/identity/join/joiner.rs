//! The side that wants a certificate.

use crate::frame::{Frame, Kind};
use crate::{Duration, Instant, Machine, MeshId, NodeId, wire};

use super::super::authority::AuthorityError;
use super::super::certificate::{Certificate, CertificateError};
use super::super::invite::Invite;
use super::super::key::NodeKey;
use super::super::trust::{Trust, TrustError};
use super::super::unix_time::UnixTime;
use super::messages::{
    Claim, Contact, JoinClaim, JoinElsewhere, JoinGrant, JoinHello, JoinProof, Refusal,
    check_contacts, value,
};
use super::{ChannelBinding, JOIN_WAIT, Signer, Transcript, Violation, Waiting};

/// Why a node asks.
#[derive(Clone, Debug)]
pub enum Purpose {
    /// It was invited.
    Invite(Invite),
    /// Its certificate has to be renewed; it knows its mesh already.
    Renewal { trust: Trust, certificate: Certificate },
}

impl Purpose {
    pub fn mesh(&self) -> MeshId {
        match self {
            Purpose::Invite(invite) => invite.mesh(),
            Purpose::Renewal { trust, .. } => trust.mesh(),
        }
    }
}

/// What a joiner is told.
#[derive(Clone, Debug)]
pub enum JoinerInput {
    Frame {
        frame: Frame,
        wall: UnixTime,
    },
    Timer,
    /// The peer closed the stream or the connection.
    Closed,
}

/// What its shell must do. After `Joined`, `Elsewhere` or `Failed` comes nothing more.
#[derive(Clone, Debug)]
pub enum JoinerOutput {
    Send(Frame),
    Joined(Box<Joined>),
    /// Ask these instead, in this order.
    Elsewhere(Vec<Contact>),
    Failed(JoinError),
}

/// What a node knows after it has joined; to be made durable before it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    pub trust: Trust,
    pub certificate: Certificate,
    pub peers: Vec<Contact>,
}

/// The exchange as seen by the side that asks.
#[derive(Debug)]
pub struct Joiner {
    purpose: Purpose,
    key: NodeKey,
    peer: NodeId,
    binding: ChannelBinding,
    nonce: [u8; 32],
    state: State,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum State {
    AwaitProof,
    AwaitGrant { trust: Trust },
    Ended,
}

impl Joiner {
    /// Begins: the frame is to be sent first. `peer` is who TLS says is there, `nonce` is random.
    pub fn new(
        now: Instant,
        purpose: Purpose,
        key: NodeKey,
        (peer, binding): (NodeId, ChannelBinding),
        nonce: [u8; 32],
    ) -> (Joiner, Frame) {
        let hello = Frame::new(Kind::JOIN_HELLO, &JoinHello { nonce });
        let deadline = Some(now + JOIN_WAIT);
        let state = State::AwaitProof;
        (Joiner { purpose, key, peer, binding, nonce, state, deadline }, hello)
    }

    fn on_frame(&mut self, frame: Frame, wall: UnixTime) -> Result<JoinerOutput, JoinError> {
        match (&self.state, frame.kind) {
            (_, Kind::JOIN_REFUSAL) => Err(JoinError::Refused(value(&frame)?)),
            (State::AwaitProof, Kind::JOIN_PROOF) => {
                let (trust, claim) = self.on_proof(value(&frame)?, wall)?;
                self.state = State::AwaitGrant { trust };
                Ok(JoinerOutput::Send(Frame::new(Kind::JOIN_CLAIM, &claim)))
            }
            (State::AwaitGrant { trust }, Kind::JOIN_GRANT) => {
                let JoinGrant { certificate, peers } = value(&frame)?;
                check_contacts(&peers)?;
                trust.check(&certificate, self.key.id(), wall).map_err(JoinError::Grant)?;
                let trust = trust.clone();
                Ok(JoinerOutput::Joined(Box::new(Joined { trust, certificate, peers })))
            }
            (State::AwaitGrant { .. }, Kind::JOIN_ELSEWHERE) => {
                let JoinElsewhere { authorities } = value(&frame)?;
                check_contacts(&authorities)?;
                Ok(JoinerOutput::Elsewhere(authorities))
            }
            _ => {
                let waiting = self.waiting();
                Err(Violation::Unexpected { kind: frame.kind.0, waiting }.into())
            }
        }
    }

    /// Checks that the peer belongs to the mesh, and only then makes a claim.
    fn on_proof(&self, proof: JoinProof, wall: UnixTime) -> Result<(Trust, JoinClaim), JoinError> {
        let mesh = self.purpose.mesh();
        if proof.root.mesh() != mesh {
            return Err(JoinError::OtherMesh { ours: mesh, theirs: proof.root.mesh() });
        }
        let transcript = Transcript::new(
            self.binding,
            (self.key.id(), self.nonce),
            (self.peer, proof.nonce),
            mesh,
        );
        if !transcript.verifies(Signer::Issuer, &[], self.peer, &proof.signature) {
            return Err(JoinError::Intercepted);
        }
        let theirs = Trust::verify(proof.root, proof.links, proof.revocations, wall)?;
        let trust = match &self.purpose {
            Purpose::Invite(invite) => {
                pinned(invite, &theirs)?;
                theirs
            }
            Purpose::Renewal { trust, .. } => {
                let mut trust = trust.clone();
                trust.merge_chain(theirs.chain().clone())?;
                let events = theirs.revocations().iter().cloned().collect();
                trust.merge_revocations(events, wall).map_err(TrustError::from)?;
                trust
            }
        };
        trust.check(&proof.certificate, self.peer, wall).map_err(JoinError::Peer)?;
        let claim = match &self.purpose {
            Purpose::Invite(invite) => {
                let record = invite.record.clone();
                let about = wire::encode(&record);
                let signature = transcript.sign(Signer::Token, &about, invite.key());
                Claim::Invite { record, signature }
            }
            Purpose::Renewal { certificate, .. } => {
                Claim::Renewal { certificate: certificate.clone() }
            }
        };
        let signature = transcript.sign(Signer::Joiner, &wire::encode(&claim), &self.key);
        Ok((trust, JoinClaim { claim, signature }))
    }

    fn waiting(&self) -> Waiting {
        match self.state {
            State::AwaitProof => Waiting::Proof,
            State::AwaitGrant { .. } => Waiting::Grant,
            State::Ended => Waiting::Nothing,
        }
    }
}

/// The chain must contain the set that the token names: an older chain, or one that forks off before,
/// is of somebody who has no authority any more. A chain that the root began anew may start later.
fn pinned(invite: &Invite, theirs: &Trust) -> Result<(), JoinError> {
    let record = &invite.record.body;
    let first = theirs.chain().links().first().map_or(0, |l| l.body.epoch);
    if record.epoch < first {
        return Ok(());
    }
    match theirs.chain().at(record.epoch) {
        None => Err(JoinError::Behind { theirs: theirs.epoch(), token: record.epoch }),
        Some(set) if set.hash() == record.head => Ok(()),
        Some(_) => Err(JoinError::Forked { epoch: record.epoch }),
    }
}

impl Machine for Joiner {
    type Input = JoinerInput;
    type Output = JoinerOutput;

    fn handle(&mut self, now: Instant, input: JoinerInput, out: &mut Vec<JoinerOutput>) {
        if matches!(self.state, State::Ended) {
            return;
        }
        let handled = match input {
            JoinerInput::Frame { frame, .. } if frame.kind.is_optional() => return,
            JoinerInput::Frame { frame, wall } => self.on_frame(frame, wall),
            JoinerInput::Timer if self.deadline.is_some_and(|d| now >= d) => {
                Err(JoinError::Timeout { waiting: self.waiting(), after: JOIN_WAIT })
            }
            JoinerInput::Timer => return,
            JoinerInput::Closed => Err(JoinError::Closed { waiting: self.waiting() }),
        };
        self.deadline = match handled {
            Ok(JoinerOutput::Send(_)) => Some(now + JOIN_WAIT),
            _ => None,
        };
        if self.deadline.is_none() {
            self.state = State::Ended;
        }
        out.push(handled.unwrap_or_else(JoinerOutput::Failed));
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

impl std::fmt::Debug for ChannelBinding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChannelBinding(…)")
    }
}

/// Why a node did not get a certificate. It has told nothing secret, whatever the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    #[error("the node that answered belongs to mesh {}, not to {}", theirs.short(), ours.short())]
    OtherMesh { ours: MeshId, theirs: MeshId },
    #[error(
        "the node that answered did not prove who it is on this connection: somebody may stand in \
         between"
    )]
    Intercepted,
    #[error("its authority chain is not to be believed: {0}")]
    Trust(#[from] TrustError),
    #[error("its certificate is not accepted: {0}")]
    Peer(CertificateError),
    #[error(
        "the node that answered knows the mesh's authorities of epoch {theirs} only, the token is \
         of epoch {token}: ask another node, or later"
    )]
    Behind { theirs: u64, token: u64 },
    #[error("the mesh has changed its authorities of epoch {epoch} since: make a new token")]
    Forked { epoch: u64 },
    #[error("refused: {0}")]
    Refused(Refusal),
    #[error("the certificate that was granted is of no use: {0}")]
    Grant(CertificateError),
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("waited {} s in vain for {waiting}", after.as_secs())]
    Timeout { waiting: Waiting, after: Duration },
    #[error("the connection ended while waiting for {waiting}")]
    Closed { waiting: Waiting },
}

impl From<AuthorityError> for JoinError {
    fn from(error: AuthorityError) -> Self {
        JoinError::Trust(error.into())
    }
}
