//! STARTTLS with certificates both ways, by libnbd and by hand.
#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(unreachable_pub, dead_code, reason = "shared by several test programs")]
mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use blockfilter::block::Export;
use blockfilter::engine::real::RealClock;
use blockfilter::nbd::file::FileExport;
use blockfilter::nbd::handshake::OpenError;
use blockfilter::nbd::listen::{Address, Listener};
use blockfilter::nbd::server::{Exports, Peer, ServerConfig, ServerHandle};
use common::{run, run_any};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate and its key, as PEM.
fn issue(ca: &Authority, name: &str) -> (String, String) {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, ca).unwrap().pem(), key.serialize_pem())
}

/// The folder that libnbd takes its certificates from.
fn client_dir(dir: &Path, trusted: &Authority, own: &Authority, name: &str) -> String {
    let dir = dir.join(name);
    std::fs::create_dir(&dir).unwrap();
    let (cert, key) = issue(own, name);
    std::fs::write(dir.join("ca-cert.pem"), trusted.pem()).unwrap();
    std::fs::write(dir.join("client-cert.pem"), cert).unwrap();
    std::fs::write(dir.join("client-key.pem"), key).unwrap();
    dir.to_str().unwrap().to_owned()
}

fn server_tls(ca: &Authority) -> Arc<rustls::ServerConfig> {
    let (cert, key) = issue(ca, "localhost");
    let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let roots = Arc::new(roots);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![cert], key);
    Arc::new(config.unwrap())
}

/// Remembers who asked.
#[derive(Debug)]
struct Guarded {
    export: Arc<dyn Export>,
    seen: Mutex<Vec<Vec<u8>>>,
}

impl Exports for Guarded {
    fn list(&self, _peer: &Peer) -> Vec<String> {
        vec!["disk".to_owned()]
    }
    fn open(&self, _name: &str, peer: &Peer) -> Result<Arc<dyn Export>, OpenError> {
        let first = peer.certificates.first().map(|c| c.to_vec()).unwrap_or_default();
        self.seen.lock().unwrap().push(first);
        Ok(Arc::clone(&self.export))
    }
}

#[test]
fn only_a_peer_with_our_certificate_gets_anything() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, common::noise(9 << 20, 4)).unwrap();
    let (ours, theirs) = (authority("ours"), authority("theirs"));
    let config = ServerConfig {
        tls: Some(server_tls(&ours)),
        tls_required: true,
        ..ServerConfig::default()
    };
    let export = Arc::new(FileExport::open(&path, false).unwrap());
    let exports = Arc::new(Guarded { export, seen: Mutex::default() });
    let listeners = vec![Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned())).unwrap()];
    let clock = Arc::new(RealClock::new());
    let for_server = Arc::clone(&exports) as Arc<dyn Exports>;
    let server = ServerHandle::start(listeners, config, for_server, clock).unwrap();
    let address = server.addresses()[0].to_string();
    let port = address.rsplit(':').next().unwrap();
    let uri = |certificates: &str| {
        format!("nbds://localhost:{port}/disk?tls-certificates={certificates}")
    };

    // In the clear: nothing, not even a list.
    let (ok, _) = run_any("nbdinfo", &[&format!("nbd://{address}/disk")]);
    assert!(!ok);
    let (ok, text) = run_any("nbdinfo", &["--list", &format!("nbd://{address}")]);
    assert!(!ok && !text.contains("\"disk\""), "{text}");
    assert!(nbd::client::handshake(&mut TcpStream::connect(&address).unwrap(), b"disk").is_err());
    // With another authority's certificate: nothing.
    let wrong = client_dir(dir.path(), &ours, &theirs, "mallory");
    let (ok, _) = run_any("nbdinfo", &[&uri(&wrong)]);
    assert!(!ok);
    assert!(exports.seen.lock().unwrap().is_empty());
    // With ours: everything.
    let right = client_dir(dir.path(), &ours, &ours, "alice");
    let text = run("nbdinfo", &["--json", &uri(&right)]);
    assert!(text.contains("\"TLS\": true"), "{text}");
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&uri(&right), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&path).unwrap());
    run("nbdcopy", &[copy.to_str().unwrap(), &uri(&right)]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&path).unwrap());
    let alice = std::fs::read(format!("{right}/client-cert.pem")).unwrap();
    let alice = CertificateDer::from_pem_slice(&alice).unwrap();
    assert!(exports.seen.lock().unwrap().iter().all(|c| *c == alice.as_ref()));
}

#[test]
fn what_follows_starttls_in_the_clear_is_thrown_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let config =
        ServerConfig { tls: Some(server_tls(&authority("ours"))), ..ServerConfig::default() };
    let export = Arc::new(FileExport::open(&path, false).unwrap());
    let exports = Arc::new(Guarded { export, seen: Mutex::default() });
    let listeners = vec![Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned())).unwrap()];
    let for_server = Arc::clone(&exports) as Arc<dyn Exports>;
    let clock = Arc::new(RealClock::new());
    let server = ServerHandle::start(listeners, config, for_server, clock).unwrap();
    let mut stream = TcpStream::connect(server.addresses()[0].to_string()).unwrap();
    let starttls = b"IHAVEOPT\0\0\0\x05\0\0\0\0";
    let open = b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk";
    stream.write_all(&[&[0, 0, 0, 3][..], starttls, open].concat()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    assert_eq!(all.len(), 18 + 20, "greeting and the answer to STARTTLS");
    assert!(exports.seen.lock().unwrap().is_empty());
}
