//! TLS 1.3 between nodes: each side shows a self-signed certificate of its Ed25519 node key, and the
//! key in it is the peer's identity. Names, dates and issuers of these certificates mean nothing;
//! membership is decided after the handshake.

use std::sync::Arc;

use protocol::NodeId;
use protocol::identity::NodeKey;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    ServerConfig, SignatureScheme,
};

/// The protocol of the data plane.
pub const ALPN: &[u8] = b"grapevine/1";

/// The protocol of the overlay, on the same port.
pub const OVERLAY_ALPN: &[u8] = b"grapevine-overlay/1";

/// The name in certificates and in the client's hello; it says nothing.
pub(crate) const SERVER_NAME: &str = "grapevine";

/// A node's TLS: what it answers with, and what it dials with.
pub(crate) struct Tls {
    /// Speaks both protocols; the dialler chooses.
    pub server: ServerConfig,
    /// Dials the data plane.
    pub client: ClientConfig,
    /// Dials the overlay.
    pub overlay: ClientConfig,
}

impl Tls {
    /// # Errors
    /// If the crypto library refuses the key.
    pub fn new(key: &NodeKey) -> Result<Tls, Box<dyn std::error::Error + Send + Sync>> {
        let provider = Arc::new(CryptoProvider {
            // With the other parts of its default, which are the only TLS 1.3 suites there are.
            ..aws_lc_rs::default_provider()
        });
        let (certificate, secret) = self_signed(key)?;
        let verifier = Arc::new(NodeVerifier { provider: provider.clone() });
        let versions = &[&rustls::version::TLS13];
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(verifier.clone())
            .with_single_cert(vec![certificate.clone()], secret.clone_key())?;
        server.alpn_protocols = vec![ALPN.to_vec(), OVERLAY_ALPN.to_vec()];
        // No resumption: every connection proves both keys. No early data: it can be replayed.
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(vec![certificate], secret)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = rustls::client::Resumption::disabled();
        // Session secrets are written nowhere, whatever SSLKEYLOGFILE says.
        server.key_log = Arc::new(rustls::NoKeyLog {});
        client.key_log = Arc::new(rustls::NoKeyLog {});
        let mut overlay = client.clone();
        overlay.alpn_protocols = vec![OVERLAY_ALPN.to_vec()];
        Ok(Tls { server, client, overlay })
    }
}

fn self_signed(
    key: &NodeKey,
) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), rcgen::Error> {
    let pkcs8 = PrivatePkcs8KeyDer::from([PKCS8_ED25519, &key.secret()].concat());
    let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519)?;
    let params = rcgen::CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    let certificate = params.self_signed(&pair)?;
    Ok((certificate.der().clone(), PrivateKeyDer::Pkcs8(pkcs8)))
}

/// The node whose Ed25519 key a certificate holds.
pub(crate) fn node_of(certificate: &CertificateDer<'_>) -> Option<NodeId> {
    let info = ParsedCertificate::try_from(certificate).ok()?.subject_public_key_info();
    let key = info.as_ref().strip_prefix(SPKI_ED25519)?;
    key.try_into().ok().map(NodeId)
}

/// Accepts exactly one certificate with an Ed25519 key. That the peer holds the key is proved by its
/// signature over the handshake.
#[derive(Debug)]
struct NodeVerifier {
    provider: Arc<CryptoProvider>,
}

impl NodeVerifier {
    fn check(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), Error> {
        match rest.is_empty() && node_of(leaf).is_some() {
            true => Ok(()),
            false => Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(
                std::io::Error::other("not one certificate of an Ed25519 key"),
            ))))),
        }
    }
}

/// How signatures are checked: the trait for servers and the one for clients ask it in the same words.
macro_rules! signatures {
    () => {
        /// TLS 1.2 is not configured; this is never asked.
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.provider.signature_verification_algorithms;
            verify_tls13_signature(message, certificate, signature, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }
    };
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for NodeVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    signatures!();
}

/// A PKCS #8 v1 private key up to its 32 secret bytes (RFC 8410, section 7).
const PKCS8_ED25519: &[u8] =
    &[0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

/// A SubjectPublicKeyInfo up to its 32 key bytes (RFC 8410, section 4).
const SPKI_ED25519: &[u8] = &[0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_in_the_certificate_is_the_node() {
        let key = NodeKey::from_secret([7; 32]);
        let (certificate, _) = self_signed(&key).unwrap();
        assert_eq!(node_of(&certificate), Some(key.id()));
        assert_eq!(node_of(&CertificateDer::from(vec![0x30, 0])), None);
        let other = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![SERVER_NAME.to_owned()]).unwrap();
        assert_eq!(node_of(params.self_signed(&other).unwrap().der()), None, "an ECDSA key");
        assert!(Tls::new(&key).is_ok());
    }
}
