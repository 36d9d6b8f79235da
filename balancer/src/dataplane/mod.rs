//! t
mod load;
mod paths;
mod plan;
mod tables;
mod wire;
#[cfg(test)]
mod t {
    #[test]
    fn loads() {
        let dir = std::path::Path::new("/sys/fs/bpf/spike_lead");
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir).unwrap();
        let k = super::load::Kernel::read().unwrap();
        let mut o = k.open_object(dir, 5).unwrap();
        super::load::check_pins(dir).unwrap();
        for f in [0,1] {
        let t = std::time::Instant::now();
        let r = if f==0 { super::load::account(&mut o).map(|p| p.info().unwrap().verified_instruction_count()) } else { super::load::steer(&mut o).map(|p| p.info().unwrap().verified_instruction_count()) };
        match r { Ok(n) => println!("{f} ok {:?} {:?}", t.elapsed(), n), Err(e) => { let e=format!("{e:?}"); std::fs::write(format!("/tmp/verifier{f}.log"), &e).unwrap(); println!("{f} {}", &e[e.len().saturating_sub(3000)..]); } }
        }
        let _ = std::fs::remove_dir_all(dir);
    }
}
