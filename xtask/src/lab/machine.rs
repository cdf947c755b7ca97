// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lab host as a process: QEMU that emulates everything, its console in a log, its reports on
//! a second serial line.
//!
//! Does not know what the reports mean.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use rustix::process::{Signal, set_parent_process_death_signal};

use crate::boot::Boot;
use crate::error::{Error, Result};
use crate::run;

/// Persistent memory of the lab host: the filesystems under test.
const NVDIMM_BYTES: u64 = 2 << 30;

/// The lab host reports each step, and ends one that takes longer than twenty minutes (STEP_SECONDS of
/// `tests/lab/host.sh`); when it says nothing for longer, it hangs.
const PATIENCE: Duration = Duration::from_secs(1500);

/// A lab host that is not running yet.
#[derive(Debug)]
pub struct Machine<'a> {
    /// The emulator.
    pub qemu: &'a Path,
    /// What it boots.
    pub boot: &'a Boot,
    /// Where its console's output goes, with what QEMU itself says.
    pub log: PathBuf,
    /// A folder for its other files, which take much space.
    pub work: &'a Path,
    /// The environment of its init, as `NAME=value` words of the kernel's command line.
    pub environment: String,
    /// The name of a file in `work` that is an ordinary disk of it, if it has one.
    pub disk: Option<&'a str>,
}

/// How a lab host came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It powered itself off.
    PoweredOff,
    /// It lost its power: QEMU was killed.
    Killed,
}

impl Machine<'_> {
    /// Runs it to its end, with each line of the reports given to `each`.
    ///
    /// # Errors
    /// QEMU cannot be started, fails, or says nothing for 25 minutes.
    pub fn run(&self, mut each: impl FnMut(&str)) -> Result<()> {
        self.run_until(|line| {
            each(line);
            ControlFlow::Continue(())
        })
        .map(drop)
    }

    /// Runs it with each line of the reports given to `each`, and kills it (SIGKILL) when that says so.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_until(&self, mut each: impl FnMut(&str) -> ControlFlow<()>) -> Result<End> {
        let log = File::create(&self.log)
            .and_then(|_| OpenOptions::new().append(true).open(&self.log))
            .map_err(Error::file("create", &self.log))?;
        let mut command = self.command()?;
        // By this name, because commas in the log's own would end it.
        command
            .args(["-chardev", "file,id=console,append=on,path=/dev/stderr"])
            .args(["-serial", "chardev:console", "-serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut running = Running::start(&mut command)?;
        for line in running.lines() {
            if each(&line?).is_break() {
                // Dropped, and thereby killed and waited for.
                return Ok(End::Killed);
            }
        }
        let status = running.wait()?;
        if status.success() {
            return Ok(End::PoweredOff);
        }
        Err(Error::Failed(format!("QEMU ended with {status}")))
    }

    /// Runs it with its console on the terminal.
    ///
    /// # Errors
    /// QEMU cannot be started, or fails.
    pub fn run_on_terminal(&self) -> Result<()> {
        let mut command = self.command()?;
        command.args(["-serial", "mon:stdio", "-serial", "null"]);
        if run::shown(&mut command)? {
            return Ok(());
        }
        Err(Error::Failed("QEMU".into()))
    }

    /// All but the serial lines. The names of files are relative to the folder, because commas in
    /// a name would end it.
    fn command(&self) -> Result<Command> {
        let nvdimm = self.work.join("nvdimm");
        File::create(&nvdimm)
            .and_then(|file| file.set_len(NVDIMM_BYTES))
            .map_err(Error::file("create", &nvdimm))?;
        let memory =
            format!("memory-backend-file,id=pm,mem-path=nvdimm,size={NVDIMM_BYTES},share=on");
        // A kernel that hangs ends the machine, and says where it hung.
        let append = format!(
            "console=ttyS0 quiet panic=-1 watchdog_thresh=30 softlockup_panic=1 \
             rcupdate.rcu_cpu_stall_timeout=60 sysctl.kernel.panic_on_rcu_stall=1 intel_iommu=on {}",
            self.environment
        );
        let mut command = Command::new(self.qemu);
        end_with_this_thread(&mut command);
        command
            .current_dir(self.work)
            .args(["-machine", "q35,nvdimm=on,accel=tcg"])
            .args(["-cpu", "max,+svm,+npt", "-smp", "2"])
            .args(["-m", "3G,slots=2,maxmem=16G"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            // A device to give away, behind an IOMMU, which has to come first.
            .args(["-device", "intel-iommu", "-device", "pci-testdev"])
            .args(["-object", &memory, "-device", "nvdimm,id=nv,memdev=pm"])
            .arg("-kernel")
            .arg(&self.boot.kernel)
            .arg("-initrd")
            .arg(&self.boot.initramfs)
            .args(["-append", &append]);
        if let Some(disk) = self.disk {
            // What the lab host has written is in the file when it is told so, whoever is killed after that. That the file
            // reaches a disk of this machine, which keeps its power, would only cost time: flushes are not carried out.
            let drive = format!("if=virtio,format=raw,cache=unsafe,file={disk}");
            command.args(["-drive", &drive]);
        }
        Ok(command)
    }
}

/// A QEMU process; killed when dropped.
#[derive(Debug)]
struct Running {
    child: Child,
    reports: Receiver<String>,
}

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let name = PathBuf::from(command.get_program()).display().to_string();
        let mut child = command.spawn().map_err(run::start_error(&name))?;
        let (sender, reports) = channel();
        if let Some(output) = child.stdout.take() {
            thread::spawn(move || {
                for line in lines_of(output) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self { child, reports })
    }

    /// The lines up to the end of the output, or an error if none comes for too long.
    fn lines(&self) -> impl Iterator<Item = Result<String>> {
        std::iter::from_fn(|| match self.reports.recv_timeout(PATIENCE) {
            Ok(line) => Some(Ok(line)),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => Some(Err(Error::Failed(format!(
                "the lab host has said nothing for {}",
                run::seconds(PATIENCE)
            )))),
        })
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().map_err(run::start_error("QEMU"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the kernel kill the machine when the thread that starts it ends, which waits for it otherwise: so also if xtask is
/// killed.
fn end_with_this_thread(command: &mut Command) {
    let ask = || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: `ask` runs between fork and exec, where it makes one system call and nothing else: no allocation, no lock.
    unsafe { command.pre_exec(ask) };
}

fn lines_of(output: impl Read) -> impl Iterator<Item = String> {
    BufReader::new(output)
        .split(b'\n')
        .map_while(|line| line.ok())
        .map(|line| String::from_utf8_lossy(&line).trim_end().to_string())
}
