//! QUIC without a node behind it: whoever wants to say something else than a node would.

use std::net::SocketAddr;
use std::sync::Arc;

use node::mesh::ALPN;
use protocol::frame::{Frame, HEADER_BYTES, Header};
use protocol::identity::NodeKey;
use protocol::identity::join::{ChannelBinding, EXPORTER_LABEL};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig};
use rustls::{Error, SignatureScheme};

use super::support::loopback;

/// An endpoint with a key of its own, which asks nobody for anything.
pub struct Raw {
    pub key: NodeKey,
    pub endpoint: quinn::Endpoint,
}

impl Raw {
    pub fn new(secret: u8) -> Raw {
        let key = NodeKey::from_secret([secret; 32]);
        let pkcs8 = PrivatePkcs8KeyDer::from([PKCS8_ED25519, &key.secret()].concat());
        let pair =
            rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519).unwrap();
        let params = rcgen::CertificateParams::new(vec!["grapevine".to_owned()]).unwrap();
        let chain = vec![params.self_signed(&pair).unwrap().der().clone()];
        let secret = PrivateKeyDer::Pkcs8(pkcs8);
        let provider = Arc::new(aws_lc_rs::default_provider());
        let anyone = Arc::new(Anyone(provider.clone()));
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(anyone.clone())
            .with_single_cert(chain.clone(), secret.clone_key())
            .unwrap();
        server.alpn_protocols = vec![ALPN.to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(anyone)
            .with_client_auth_cert(chain, secret)
            .unwrap();
        client.alpn_protocols = vec![ALPN.to_vec()];
        let server = Arc::new(QuicServerConfig::try_from(server).unwrap());
        let client = Arc::new(QuicClientConfig::try_from(client).unwrap());
        let server = quinn::ServerConfig::with_crypto(server);
        let mut endpoint = quinn::Endpoint::server(server, loopback()).unwrap();
        endpoint.set_default_client_config(quinn::ClientConfig::new(client));
        Raw { key, endpoint }
    }

    pub fn address(&self) -> SocketAddr {
        self.endpoint.local_addr().unwrap()
    }

    pub async fn dial(&self, address: SocketAddr) -> quinn::Connection {
        self.endpoint.connect(address, "grapevine").unwrap().await.unwrap()
    }
}

/// What both ends of a connection share, and nobody in between.
pub fn binding(connection: &quinn::Connection) -> ChannelBinding {
    let mut binding = [0; 32];
    connection.export_keying_material(&mut binding, EXPORTER_LABEL, &[]).unwrap();
    ChannelBinding(binding)
}

/// The next frame of a stream; `None` at its end or if it breaks off.
pub async fn next_frame(receive: &mut quinn::RecvStream) -> Option<Frame> {
    let mut header = [0; HEADER_BYTES];
    receive.read_exact(&mut header).await.ok()?;
    let Header { bytes, kind, .. } = Header::decode(header, 1 << 20).ok()?;
    let mut body = vec![0; bytes];
    receive.read_exact(&mut body).await.ok()?;
    Some(Frame { kind, body })
}

#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl Anyone {
    fn check(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        unreachable!("TLS 1.3 only")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for Anyone {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        unreachable!("TLS 1.3 only")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// A PKCS #8 v1 private key up to its 32 secret bytes (RFC 8410, section 7).
const PKCS8_ED25519: &[u8] =
    &[0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
