//! The side that is asked for a certificate.

use std::sync::Arc;

use crate::frame::{Frame, Kind};
use crate::{Duration, Instant, Machine, NodeId, wire};

use super::super::certificate::{Certificate, CertificateError, Roles};
use super::super::invite::{InviteError, SignedRecord};
use super::super::key::NodeKey;
use super::super::trust::Trust;
use super::super::unix_time::UnixTime;
use super::messages::{
    Claim, Contact, JoinClaim, JoinElsewhere, JoinGrant, JoinHello, JoinProof, Refusal, value,
};
use super::{ChannelBinding, JOIN_WAIT, Signer, Transcript, Violation, Waiting};

/// The node that is asked, at the moment when the exchange begins.
#[derive(Clone, Debug)]
pub struct IssuerPlace {
    pub key: NodeKey,
    pub trust: Arc<Trust>,
    pub certificate: Certificate,
    /// Where nodes can be found: those that are authorities are told to whom must ask elsewhere, all of
    /// them to whom is let in. At most [`super::CONTACTS_MAX`], this node among them.
    pub contacts: Vec<Contact>,
    /// Random.
    pub nonce: [u8; 32],
    /// Random.
    pub serial: u64,
}

/// What an issuer is told.
#[derive(Clone, Debug)]
pub enum IssuerInput {
    Frame {
        frame: Frame,
        wall: UnixTime,
    },
    /// The use that [`IssuerOutput::Redeem`] asked for is counted and durable, or it is refused.
    Redeemed {
        result: Result<(), Refusal>,
        wall: UnixTime,
    },
    Timer,
    Closed,
}

/// What its shell must do.
#[derive(Clone, Debug)]
pub enum IssuerOutput {
    Send(Frame),
    /// Count a use of this token by the peer, make it durable, then say so.
    Redeem(SignedRecord),
    /// The exchange is over: a certificate was sent.
    Granted(Certificate),
    /// The exchange is over: the peer must ask elsewhere.
    Redirected,
    /// The exchange is over without a certificate; what was sent before said why.
    Failed(IssuerError),
}

/// The exchange as seen by the side that is asked.
#[derive(Debug)]
pub struct Issuer {
    pub(super) place: IssuerPlace,
    pub(super) peer: NodeId,
    binding: ChannelBinding,
    state: State,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum State {
    AwaitHello,
    AwaitClaim { joiner_nonce: [u8; 32] },
    AwaitRedemption { roles: Roles },
    Ended,
}

impl Issuer {
    /// Waits for the hello of `peer`, which TLS says is there.
    pub fn new(
        now: Instant,
        place: IssuerPlace,
        (peer, binding): (NodeId, ChannelBinding),
    ) -> Issuer {
        let deadline = Some(now + JOIN_WAIT);
        Issuer { place, peer, binding, state: State::AwaitHello, deadline }
    }

    fn on_frame(
        &mut self,
        frame: Frame,
        wall: UnixTime,
        out: &mut Vec<IssuerOutput>,
    ) -> Result<(), IssuerError> {
        match (&self.state, frame.kind) {
            (State::AwaitHello, Kind::JOIN_HELLO) => {
                let JoinHello { nonce } = value(&frame)?;
                let proof = self.proof(nonce);
                out.push(IssuerOutput::Send(Frame::new(Kind::JOIN_PROOF, &proof)));
                self.state = State::AwaitClaim { joiner_nonce: nonce };
                Ok(())
            }
            (State::AwaitClaim { joiner_nonce }, Kind::JOIN_CLAIM) => {
                let transcript = self.transcript(*joiner_nonce);
                self.on_claim(value(&frame)?, transcript, wall, out)
            }
            _ => {
                let waiting = self.waiting();
                Err(Violation::Unexpected { kind: frame.kind.0, waiting }.into())
            }
        }
    }

    fn transcript(&self, joiner_nonce: [u8; 32]) -> Transcript {
        Transcript::new(
            self.binding,
            (self.peer, joiner_nonce),
            (self.place.key.id(), self.place.nonce),
            self.place.trust.mesh(),
        )
    }

    fn proof(&self, joiner_nonce: [u8; 32]) -> JoinProof {
        let IssuerPlace { key, trust, certificate, nonce, .. } = &self.place;
        JoinProof {
            root: trust.root(),
            links: trust.chain().links().to_vec(),
            revocations: trust.revocations().iter().cloned().collect(),
            certificate: certificate.clone(),
            nonce: *nonce,
            signature: self.transcript(joiner_nonce).sign(Signer::Issuer, &[], key),
        }
    }

    fn on_claim(
        &mut self,
        JoinClaim { claim, signature }: JoinClaim,
        transcript: Transcript,
        wall: UnixTime,
        out: &mut Vec<IssuerOutput>,
    ) -> Result<(), IssuerError> {
        let about = wire::encode(&claim);
        if !transcript.verifies(Signer::Joiner, &about, self.peer, &signature) {
            return Err(IssuerError::Forged);
        }
        let trust = &self.place.trust;
        if trust.revocations().is_revoked(self.peer) {
            return Err(CertificateError::Revoked { node: self.peer }.into());
        }
        match claim {
            Claim::Invite { record, signature } => {
                record.check(trust, wall)?;
                let (secret_half, about) = (NodeId(record.body.id.0), wire::encode(&record));
                if !transcript.verifies(Signer::Token, &about, secret_half, &signature) {
                    return Err(IssuerError::Secret);
                }
                let home = record.home(trust);
                if home != self.place.key.id() {
                    self.redirect(Some(home), out);
                    return Ok(());
                }
                self.state = State::AwaitRedemption { roles: record.body.roles };
                out.push(IssuerOutput::Redeem(record));
                Ok(())
            }
            Claim::Renewal { certificate } => {
                trust.check_renewal(&certificate, self.peer, wall)?;
                if !trust.is_authority(self.place.key.id()) {
                    self.redirect(None, out);
                    return Ok(());
                }
                self.grant(certificate.body.roles, wall, out)
            }
        }
    }

    /// Names those who can decide, `home` first.
    fn redirect(&mut self, home: Option<NodeId>, out: &mut Vec<IssuerOutput>) {
        let IssuerPlace { trust, contacts, key, .. } = &self.place;
        let me = key.id();
        let wanted = |c: &&Contact| match home {
            Some(home) => c.node == home,
            None => trust.is_authority(c.node) && c.node != me,
        };
        let authorities = contacts.iter().filter(wanted).cloned().collect();
        let elsewhere = JoinElsewhere { authorities };
        out.push(IssuerOutput::Send(Frame::new(Kind::JOIN_ELSEWHERE, &elsewhere)));
        out.push(IssuerOutput::Redirected);
        self.state = State::Ended;
    }

    fn grant(
        &mut self,
        roles: Roles,
        wall: UnixTime,
        out: &mut Vec<IssuerOutput>,
    ) -> Result<(), IssuerError> {
        let IssuerPlace { key, trust, serial, contacts, .. } = &self.place;
        let certificate = trust.issue(key, self.peer, roles, *serial, wall)?;
        let grant = JoinGrant { certificate: certificate.clone(), peers: contacts.clone() };
        out.push(IssuerOutput::Send(Frame::new(Kind::JOIN_GRANT, &grant)));
        out.push(IssuerOutput::Granted(certificate));
        self.state = State::Ended;
        Ok(())
    }

    fn waiting(&self) -> Waiting {
        match self.state {
            State::AwaitHello => Waiting::Hello,
            State::AwaitClaim { .. } => Waiting::Claim,
            State::AwaitRedemption { .. } => Waiting::Redemption,
            State::Ended => Waiting::Nothing,
        }
    }
}

impl Machine for Issuer {
    type Input = IssuerInput;
    type Output = IssuerOutput;

    fn handle(&mut self, now: Instant, input: IssuerInput, out: &mut Vec<IssuerOutput>) {
        let handled = match (input, &self.state) {
            (_, State::Ended) => return,
            (IssuerInput::Frame { frame, .. }, _) if frame.kind.is_optional() => return,
            (IssuerInput::Frame { frame, wall }, _) => self.on_frame(frame, wall, out),
            (IssuerInput::Redeemed { result, wall }, State::AwaitRedemption { roles }) => {
                let roles = *roles;
                match result {
                    Ok(()) => self.grant(roles, wall, out),
                    Err(refusal) => Err(IssuerError::Refused(refusal)),
                }
            }
            (IssuerInput::Redeemed { .. }, _) => return,
            (IssuerInput::Timer, _) if self.deadline.is_some_and(|d| now >= d) => {
                Err(IssuerError::Timeout { waiting: self.waiting(), after: JOIN_WAIT })
            }
            (IssuerInput::Timer, _) => return,
            (IssuerInput::Closed, _) => Err(IssuerError::Closed { waiting: self.waiting() }),
        };
        if let Err(error) = handled {
            if let Some(refusal) = error.told() {
                out.push(IssuerOutput::Send(Frame::new(Kind::JOIN_REFUSAL, &refusal)));
            }
            out.push(IssuerOutput::Failed(error));
            self.state = State::Ended;
        }
        self.deadline = match self.state {
            State::Ended => None,
            _ => Some(now + JOIN_WAIT),
        };
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

/// Why a peer got no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IssuerError {
    #[error("the claim is not signed by the peer on this connection")]
    Forged,
    #[error("the token's secret is wrong, or the token was shown on another connection")]
    Secret,
    #[error(transparent)]
    Invite(#[from] InviteError),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("{0}")]
    Refused(Refusal),
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("waited {} s in vain for {waiting}", after.as_secs())]
    Timeout { waiting: Waiting, after: Duration },
    #[error("the connection ended while waiting for {waiting}")]
    Closed { waiting: Waiting },
}

impl IssuerError {
    /// Whether the peer did what no honest node does.
    pub fn is_misbehaviour(&self) -> bool {
        match self {
            IssuerError::Forged | IssuerError::Secret | IssuerError::Violation(_) => true,
            IssuerError::Invite(error) => matches!(error, InviteError::Forged),
            IssuerError::Certificate(error) => matches!(error, CertificateError::Forged),
            IssuerError::Refused(_) | IssuerError::Timeout { .. } | IssuerError::Closed { .. } => {
                false
            }
        }
    }

    /// What the peer is told.
    fn told(&self) -> Option<Refusal> {
        Some(match self {
            IssuerError::Forged => Refusal::Forged,
            IssuerError::Secret => Refusal::TokenSecret,
            IssuerError::Invite(error) => error.into(),
            IssuerError::Certificate(error) => error.into(),
            IssuerError::Refused(refusal) => refusal.clone(),
            IssuerError::Violation(_) | IssuerError::Timeout { .. } => Refusal::Protocol,
            IssuerError::Closed { .. } => return None,
        })
    }
}
