//! Who is who: the target's authority, certificates, TLS configurations.
//!
//! The target owns an authority in `T/pki` (`ca.pem`, `ca.key`) and a server
//! certificate below it (`server.pem`, `server.key`) that carries the fixed DNS
//! name [`SERVER_NAME`] besides its addresses, so that clients verify the
//! authority and the role, not where the target happens to live. An agent's
//! certificate has its id as common name and its role as organisational unit;
//! it is good for client authentication only, so an agent cannot pose as target.
//!
//! Holds: ring is the only crypto provider, TLS 1.3 the only version; private
//! keys are files with mode 0600 that never leave their machine (an agent sends
//! a CSR). Of a CSR only the public key is used, never what it asks for.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use blockfilter::engine::{Files, make_dir, read_file, replace_file};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use serde::{Deserialize, Serialize};

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A source machine: may replicate the groups it owns.
    Agent,
    /// A person or tool: may open points over nbds.
    Viewer,
    /// The target itself.
    Target,
}

impl Role {
    /// As in certificates.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Viewer => "viewer",
            Self::Target => "target",
        }
    }
}

/// Who is at the other end, as its verified certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The common name: an agent's id.
    pub name: String,
    /// Its role.
    pub role: Role,
}

/// Why keys or certificates could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file could not be read or written.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: String,
        /// Why.
        error: io::Error,
    },
    /// A file holds no usable key or certificate.
    #[error("{0}")]
    Damaged(String),
    /// There already is an authority.
    #[error("{0} already holds a certificate authority")]
    Exists(String),
    /// The CSR is not one, or its signature is wrong.
    #[error("the certificate request is not valid: {0}")]
    Request(String),
    /// The library refused.
    #[error("making a certificate failed: {0}")]
    Certificate(#[from] rcgen::Error),
    /// rustls refused.
    #[error("TLS configuration: {0}")]
    Tls(String),
    /// A name that cannot be in a certificate.
    #[error("{0:?} cannot be a certificate's name: use 1 to 64 of a-z, A-Z, 0-9, '.', '_' and '-'")]
    Name(String),
}

/// A certificate with its key, as PEM texts.
#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    /// The authority's certificate.
    pub ca_pem: String,
    /// The certificate.
    pub cert_pem: String,
    /// Its private key.
    pub key_pem: String,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").field("cert_pem", &self.cert_pem).finish_non_exhaustive()
    }
}

/// The target's certificate authority, loaded.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    sha256: String,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("sha256", &self.sha256).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes authority and server certificate in `pki`. `hosts` are addresses
    /// and DNS names by which clients may reach the target (for nbds clients,
    /// who check them). Durable on return; an interrupted call leaves no
    /// `ca.pem` and can be repeated.
    pub fn create(
        files: &dyn Files,
        pki: &Path,
        hosts: &[String],
        wall_us: u64,
    ) -> Result<Self, IdentityError> {
        if files.exists(&pki.join(CA_PEM)) {
            return Err(IdentityError::Exists(pki.display().to_string()));
        }
        make_dir(files, pki).map_err(|e| file_error(pki, e))?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = names("Standfast authority", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params, wall_us, CA_YEARS);
        let ca = params.self_signed(&key)?;
        let (ca_pem, key_pem) = (ca.pem(), key.serialize_pem());
        let sha256 = sha256_hex(ca.der());
        let authority = Self { issuer: Issuer::new(params, key), ca_pem, sha256 };
        let mut sans = vec![SERVER_NAME.to_owned(), "localhost".to_owned()];
        sans.extend(hosts.iter().filter(|h| !sans.contains(h)).cloned().collect::<Vec<_>>());
        let server = authority.issue_with("standfast-target", Role::Target, sans, wall_us)?;
        let chain = format!("{}{}", server.cert_pem, authority.ca_pem);
        for (name, text) in [
            (CA_KEY, key_pem.as_str()),
            (SERVER_KEY, server.key_pem.as_str()),
            (SERVER_PEM, chain.as_str()),
            (CA_PEM, authority.ca_pem.as_str()),
        ] {
            write(files, &pki.join(name), text)?;
        }
        Ok(authority)
    }

    /// Loads the authority of `pki`.
    pub fn load(files: &dyn Files, pki: &Path) -> Result<Self, IdentityError> {
        let ca_pem = read(files, &pki.join(CA_PEM))?;
        let key = KeyPair::from_pem(&read(files, &pki.join(CA_KEY))?)?;
        let der = first_cert(&ca_pem, &pki.join(CA_PEM))?;
        let sha256 = sha256_hex(&der);
        Ok(Self { issuer: Issuer::from_ca_cert_der(&der, key)?, ca_pem, sha256 })
    }

    /// SHA-256 of the authority's certificate, in hexadecimal.
    pub fn ca_sha256(&self) -> &str {
        &self.sha256
    }

    /// The authority's certificate.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// A certificate with a new key.
    pub fn issue(&self, name: &str, role: Role, wall_us: u64) -> Result<Issued, IdentityError> {
        self.issue_with(name, role, Vec::new(), wall_us)
    }

    fn issue_with(
        &self,
        name: &str,
        role: Role,
        sans: Vec<String>,
        wall_us: u64,
    ) -> Result<Issued, IdentityError> {
        let key = KeyPair::generate()?;
        let params = leaf(name, role, sans, wall_us)?;
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Issued {
            ca_pem: self.ca_pem.clone(),
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Signs the public key of a CSR (PEM) for `name`; returns the certificate as PEM.
    pub fn sign(
        &self,
        csr_pem: &str,
        name: &str,
        role: Role,
        wall_us: u64,
    ) -> Result<String, IdentityError> {
        let mut request = parse_csr(csr_pem)?;
        request.params = leaf(name, role, Vec::new(), wall_us)?;
        Ok(request.signed_by(&self.issuer)?.pem())
    }
}

fn parse_csr(pem: &str) -> Result<CertificateSigningRequestParams, IdentityError> {
    CertificateSigningRequestParams::from_pem(pem)
        .map_err(|e| IdentityError::Request(e.to_string()))
}

/// SHA-256 of a CSR's public key, in hexadecimal: the same key asks again after
/// an interrupted join. The CSR's signature is checked.
pub fn csr_key_sha256(csr_pem: &str) -> Result<String, IdentityError> {
    use rcgen::PublicKeyData;
    Ok(sha256_hex(parse_csr(csr_pem)?.public_key.der_bytes()))
}

/// A new private key, as PEM.
pub fn new_key() -> Result<String, IdentityError> {
    Ok(KeyPair::generate()?.serialize_pem())
}

/// A CSR (PEM) for a private key (PEM).
pub fn new_csr(key_pem: &str) -> Result<String, IdentityError> {
    let key = KeyPair::from_pem(key_pem)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = names("standfast", None);
    Ok(params.serialize_request(&key)?.pem()?)
}

fn leaf(
    name: &str,
    role: Role,
    sans: Vec<String>,
    wall_us: u64,
) -> Result<CertificateParams, IdentityError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return Err(IdentityError::Name(name.chars().take(65).collect()));
    }
    let mut params = CertificateParams::new(sans)?;
    params.distinguished_name = names(name, Some(role));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match role {
        Role::Target => ExtendedKeyUsagePurpose::ServerAuth,
        Role::Agent | Role::Viewer => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    params.use_authority_key_identifier_extension = true;
    validity(&mut params, wall_us, LEAF_YEARS);
    Ok(params)
}

fn names(common: &str, role: Option<Role>) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, common);
    if let Some(role) = role {
        names.push(DnType::OrganizationalUnitName, role.as_str());
    }
    names
}

/// From the day before (clocks differ) for whole years.
fn validity(params: &mut CertificateParams, wall_us: u64, years: i32) {
    let days = (wall_us / 86_400_000_000).min(100 * 366 * 100);
    let (year, month, day) = civil(days.saturating_sub(1));
    params.not_before = rcgen::date_time_ymd(year, month, day);
    params.not_after = rcgen::date_time_ymd(year + years, month, day.min(28));
}

/// Date of a day since 1970-01-01 (Gregorian, by 400-year eras).
fn civil(days: u64) -> (i32, u8, u8) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    (year as i32, month as u8, day as u8)
}

/// The target's side of TLS: certificates of the authority's are verified, a
/// peer without one is let in only if `anonymous` (and must be refused
/// everything but joining by who uses this).
pub fn server_tls(
    files: &dyn Files,
    pki: &Path,
    anonymous: bool,
) -> Result<Arc<ServerConfig>, IdentityError> {
    server_config(files, pki, [CA_PEM, SERVER_PEM, SERVER_KEY], anonymous)
}

/// NBD's TLS with certificates from elsewhere: `ca-cert.pem`, `server-cert.pem` and
/// `server-key.pem` in `dir` (the names that QEMU and nbdkit use). Clients must
/// show a certificate of that authority.
pub fn nbd_tls(files: &dyn Files, dir: &Path) -> Result<Arc<ServerConfig>, IdentityError> {
    server_config(files, dir, ["ca-cert.pem", "server-cert.pem", "server-key.pem"], false)
}

fn server_config(
    files: &dyn Files,
    dir: &Path,
    [ca, cert, key]: [&str; 3],
    anonymous: bool,
) -> Result<Arc<ServerConfig>, IdentityError> {
    let roots = roots(&read(files, &dir.join(ca))?, &dir.join(ca))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
    let verifier = if anonymous { verifier.allow_unauthenticated() } else { verifier };
    let verifier = verifier.build().map_err(|e| IdentityError::Tls(e.to_string()))?;
    let (chain, key) = chain_and_key(files, &dir.join(cert), &dir.join(key))?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(tls)?;
    Ok(Arc::new(config))
}

/// An agent's side of TLS, from `A/pki` (`ca.pem`, `cert.pem`, `key.pem`).
pub fn client_tls(files: &dyn Files, pki: &Path) -> Result<Arc<ClientConfig>, IdentityError> {
    let roots = roots(&read(files, &pki.join(CA_PEM))?, &pki.join(CA_PEM))?;
    let (chain, key) = chain_and_key(files, &pki.join(CERT_PEM), &pki.join(KEY_PEM))?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(tls)?;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// TLS for joining: no certificate of one's own; the target must show a chain
/// whose authority's certificate has the SHA-256 `ca_sha256` (hexadecimal) and
/// a server certificate that this authority signed.
pub fn joining_tls(ca_sha256: &str) -> Result<Arc<ClientConfig>, IdentityError> {
    let verifier = PinnedAuthority { ca_sha256: ca_sha256.to_owned(), provider: provider() };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// The name that every target's certificate carries.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("a fixed valid DNS name")
}

/// Who a verified chain belongs to.
pub fn peer_of(chain: &[CertificateDer<'_>]) -> Result<Peer, IdentityError> {
    let damaged = |what: &str| IdentityError::Damaged(format!("the peer's certificate {what}"));
    let leaf = chain.first().ok_or_else(|| damaged("is missing"))?;
    let (_, cert) =
        x509_parser::parse_x509_certificate(leaf).map_err(|_| damaged("cannot be read"))?;
    let one = |mut found: Vec<String>| if found.len() == 1 { found.pop() } else { None };
    let texts = |attributes: Vec<&x509_parser::x509::AttributeTypeAndValue<'_>>| {
        attributes.iter().filter_map(|a| a.as_str().ok().map(str::to_owned)).collect()
    };
    let name = one(texts(cert.subject().iter_common_name().collect()));
    let unit = one(texts(cert.subject().iter_organizational_unit().collect()));
    let role = [Role::Agent, Role::Viewer, Role::Target]
        .into_iter()
        .find(|role| unit.as_deref() == Some(role.as_str()))
        .ok_or_else(|| damaged("has no role"))?;
    Ok(Peer { name: name.ok_or_else(|| damaged("has no name"))?, role })
}

/// SHA-256 in hexadecimal.
pub fn sha256_hex(data: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, data);
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// The one crypto provider.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

#[derive(Debug)]
struct PinnedAuthority {
    ca_sha256: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates.iter().find(|c| sha256_hex(c) == self.ca_sha256);
        let Some(authority) = authority else {
            return Err(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer));
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let inner =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
                .build()
                .map_err(|e| rustls::Error::General(e.to_string()))?;
        inner.verify_server_cert(end_entity, &[], server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not used".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn tls(error: rustls::Error) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

fn file_error(path: &Path, error: io::Error) -> IdentityError {
    IdentityError::File { path: path.display().to_string(), error }
}

fn read(files: &dyn Files, path: &Path) -> Result<String, IdentityError> {
    let data = read_file(files, path, PEM_MAX).map_err(|e| file_error(path, e))?;
    String::from_utf8(data)
        .map_err(|_| IdentityError::Damaged(format!("{} is not text", path.display())))
}

fn write(files: &dyn Files, path: &Path, text: &str) -> Result<(), IdentityError> {
    replace_file(files, path, text.as_bytes()).map_err(|e| file_error(path, e))
}

fn first_cert(pem: &str, path: &Path) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| IdentityError::Damaged(format!("{} holds no certificate", path.display())))
}

fn roots(ca_pem: &str, path: &Path) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    roots.add(first_cert(ca_pem, path)?).map_err(tls)?;
    Ok(roots)
}

fn chain_and_key(
    files: &dyn Files,
    cert: &Path,
    key: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), IdentityError> {
    let damaged = |path: &Path| IdentityError::Damaged(format!("{} is damaged", path.display()));
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(read(files, cert)?.as_bytes()).collect();
    let chain = chain.map_err(|_| damaged(cert))?;
    let key_text = read(files, key)?;
    let key = PrivateKeyDer::from_pem_slice(key_text.as_bytes()).map_err(|_| damaged(key))?;
    Ok((chain, key))
}

/// DNS name in every target's certificate.
pub const SERVER_NAME: &str = "standfast-target";
/// The authority's certificate, at both sides.
pub const CA_PEM: &str = "ca.pem";
/// The authority's key, at the target.
pub const CA_KEY: &str = "ca.key";
/// The target's chain.
pub const SERVER_PEM: &str = "server.pem";
/// The target's key.
pub const SERVER_KEY: &str = "server.key";
/// An agent's certificate.
pub const CERT_PEM: &str = "cert.pem";
/// An agent's key.
pub const KEY_PEM: &str = "key.pem";
/// Until certificates renew themselves they must outlive the machines: an
/// expired one would stop replication.
const LEAF_YEARS: i32 = 10;
const CA_YEARS: i32 = 20;
const PEM_MAX: u64 = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_778), (2026, 11, 21));
    }

    #[test]
    fn a_certificate_says_who_and_what() {
        let dir = tempfile::tempdir().unwrap();
        let files = blockfilter::engine::real::RealFiles;
        let made = Authority::create(&files, dir.path(), &["10.0.0.1".into()], NOW).unwrap();
        let loaded = Authority::load(&files, dir.path()).unwrap();
        assert_eq!(made.ca_sha256(), loaded.ca_sha256());
        let key = new_key().unwrap();
        let csr = new_csr(&key).unwrap();
        let cert = loaded.sign(&csr, "host-1", Role::Agent, NOW).unwrap();
        let chain = [CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
        let peer = peer_of(&chain).unwrap();
        assert_eq!(peer, Peer { name: "host-1".into(), role: Role::Agent });
        assert!(matches!(
            Authority::create(&files, dir.path(), &[], NOW),
            Err(IdentityError::Exists(_))
        ));
        assert!(loaded.sign(&csr, "bad name", Role::Agent, NOW).is_err());
        assert!(loaded.sign("no csr", "a", Role::Agent, NOW).is_err());
        server_tls(&files, dir.path(), true).unwrap();
    }

    #[test]
    fn private_keys_are_for_their_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let files = blockfilter::engine::real::RealFiles;
        Authority::create(&files, dir.path(), &[], NOW).unwrap();
        for name in [CA_KEY, SERVER_KEY] {
            let mode = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    const NOW: u64 = 1_795_000_000_000_000;
}
